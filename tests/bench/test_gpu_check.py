"""The GPU check says what it did not do, resumes, keeps its time and what a stopped step had, and walks on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beagle_sd.files import write_json
from bench import processes, tuning
from bench.gpu import HEADLINES, PEERS, TILED, run_tests
from bench.gpu import check as gpu_check
from bench.report import tiles

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_gpu_check_without_a_gpu(tmp_path):
    out = tmp_path / "folder" / "gpu.json"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "BEAGLE_COMMIT": "abc"}
    done = subprocess.run(
        [ROOT / "bench" / "gpu" / "check.sh", out], env=hidden, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    record = json.loads(out.read_text())
    assert record["environment"]["gpu"] is None and record["environment"]["commit"] == "abc"
    assert {"build", "smoke", "tests", "tune", "bench:verify_tree"} <= record["steps"].keys()
    for step in record["steps"].values():
        assert step == {"status": "skipped", "why": "torch finds no CUDA device"}


@pytest.fixture
def with_gpu(monkeypatch):
    """gpu_check as if there were a GPU, with steps that only note that they ran."""
    ran = []

    def step(self, name, seconds):
        ran.append(name)
        return {"status": "failed with 1" if name == "choose_tokens" else "passed"}

    found = {"gpu": "a test's", "commit": None, "sources": "abc"}
    monkeypatch.setattr(gpu_check, "environment", lambda: dict(found))
    for kind in {step.partition(":")[0] for step in gpu_check.SECONDS}:
        monkeypatch.setattr(gpu_check.Steps, kind, step)
    return ran, found


def test_gpu_check_goes_on_and_resumes(tmp_path, with_gpu):
    (ran, _), out = with_gpu, tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "build", "bench"]) == 1
    assert ran[0] == "" and sorted(ran[1:]) == sorted(gpu_check.OPS)
    ran.clear()
    assert gpu_check.main([str(out), "bench:choose_tokens", "bench:verify_tree"]) == 1
    assert ran == ["choose_tokens"]
    assert len(json.loads(out.read_text())["steps"]) == 1 + len(gpu_check.OPS)
    with pytest.raises(SystemExit):
        gpu_check.main([str(out), "bench:nothing"])


def test_what_matters_most_comes_first():
    """Without peers, and with tiles that were tuned for it."""
    order = gpu_check.steps([])
    assert order[:4] == ["build", "smoke", "ours:round", "tune:first"] and order[-1] == "speed"
    assert "distill_loss" in HEADLINES
    assert order[4 : order.index("tests")] == [f"ours:{name}" for name in HEADLINES]
    assert order[order.index("tests") + 1] == "bench:flex_attention" and gpu_check.steps(["peers"])[3:5] == [
        "round",
        "bench:block_attention",
    ]
    assert {"round", *HEADLINES} < set(PEERS)
    benches = [f"bench:{name}" for name in gpu_check.OPS]
    kinds = set(gpu_check.SECONDS) - {"bench", "ours", "tune:first"}
    assert sorted(step for step in order if not step.startswith(("ours:", "tune:"))) == sorted([*kinds, *benches])


def test_peers_come_later(tmp_path, with_gpu, monkeypatch):
    """A benchmark that passed without its peers is measured again with them, and then never again."""
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_check.Steps, "ours", OURS)
    asked: list = []

    def bench(self, name, seconds, peers=True):
        asked.append((name, peers))
        return {"status": "passed", "rows": []}

    monkeypatch.setattr(gpu_check.Steps, "bench", bench)
    for _ in range(2):
        assert gpu_check.main([str(out), "ours:verify_tree", "ours:training_step"]) == 0
    assert asked == [("verify_tree", False), ("training_step", False)]
    assert json.loads(out.read_text())["steps"]["bench:verify_tree"]["status"] == gpu_check.WITHOUT_PEERS
    for part in ("bench:verify_tree", "bench:verify_tree", "ours:verify_tree"):
        assert gpu_check.main([str(out), part]) == 0
    assert asked[2:] == [("verify_tree", True)]


OURS = gpu_check.Steps.ours
TUNED = {"kernel": "tree", "arch": 90, "head_size": 128, "dtype": "bfloat16", "config": [64, 32, 4, 2], "shipped": [1]}


def test_other_tiles_are_measured_again(tmp_path, with_gpu, monkeypatch):
    """Benchmarks of kernels that have tiles, once; not the others, and not where the shipped tiles are the fastest."""
    (ran, _), out = with_gpu, tmp_path / "gpu.json"

    def step(self, name, seconds):
        ran.append(name)
        return {"status": "passed"} | ({"tiles": tuning.label(self.tiles()) or "shipped"} if name in TILED else {})

    monkeypatch.setattr(gpu_check.Steps, "bench", step)
    parts = ["bench:verify_tree", "bench:tree_attention"]
    assert gpu_check.main([str(out), *parts]) == 0 and ran == ["verify_tree", "tree_attention"]
    for entries, again in (
        ([TUNED | {"config": [1]}], []),
        ([TUNED], ["tree_attention"]),
        ([TUNED], []),
        ([TUNED, TUNED | {"head_size": 64}], ["tree_attention"]),
    ):
        ran.clear()
        write_json(tmp_path / "gpu.logs" / "tune.json", entries)
        assert gpu_check.main([str(out), *parts]) == 0 and ran == again


def test_the_build_takes_every_core(tmp_path, monkeypatch):
    given: list = []
    monkeypatch.setattr(gpu_check, "run", lambda *args, **variables: given.append(variables) or {})
    monkeypatch.setattr(gpu_check.os, "sched_getaffinity", lambda process: set(range(16)))
    for jobs, wanted in (("", "16"), ("3", "3")):
        monkeypatch.setenv("MAX_JOBS", jobs)
        gpu_check.Steps(True, {}, tmp_path).build("", 9)
        assert given[-1]["MAX_JOBS"] == wanted


@pytest.mark.parametrize("name, other", [("sources", "def"), ("gpu", "another")])
def test_another_run_is_set_aside(tmp_path, with_gpu, name, other):
    """Other sources or another GPU begin anew, and what was found before stays beside it."""
    (ran, found), out = with_gpu, tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "round"]) == 0
    (tmp_path / "gpu.logs" / "round.txt").write_text("before")
    found[name] = other
    assert gpu_check.main([str(out), "round"]) == 0 and ran == ["", ""]
    assert json.loads((tmp_path / "gpu.before.json").read_text())["environment"][name] != other
    assert (tmp_path / "gpu.before.logs" / "round.txt").read_text() == "before"
    assert not (tmp_path / "gpu.logs" / "round.txt").exists()
    assert gpu_check.main([str(out), "round"]) == 0 and ran == ["", ""]


def test_gpu_check_keeps_its_time(tmp_path, with_gpu):
    (ran, _), out = with_gpu, tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "round", "--seconds", "3"]) == 1 and ran == []
    assert "not begun" in json.loads(out.read_text())["steps"]["round"]["status"]
    assert gpu_check.main([str(out), "round"]) == 0 and ran == [""]


def test_a_step_without_time_keeps_what_it_had(tmp_path, with_gpu, monkeypatch):
    (_, _), out = with_gpu, tmp_path / "gpu.json"
    half = {"status": "stopped after 9 s", "rows": [{"group": "g", "peer": "beagle"}]}
    monkeypatch.setattr(gpu_check.Steps, "round", lambda *args: dict(half))
    assert gpu_check.main([str(out), "round"]) == 1
    assert gpu_check.main([str(out), "round", "--seconds", "3"]) == 1
    step = json.loads(out.read_text())["steps"]["round"]
    assert "not begun" in step["status"] and step["rows"] == half["rows"]


def test_a_step_that_breaks_leaves_the_others_their_turn(tmp_path, with_gpu, monkeypatch):
    (ran, _), out = with_gpu, tmp_path / "gpu.json"

    def broken(*args):
        raise json.JSONDecodeError("no JSON", "", 0)

    monkeypatch.setattr(gpu_check.Steps, "smoke", broken)
    assert gpu_check.main([str(out), "smoke", "round"]) == 1 and ran == [""]
    assert "JSONDecodeError" in json.loads(out.read_text())["steps"]["smoke"]["status"]


def test_smoke_is_counted(tmp_path, monkeypatch):
    def run(command, seconds, log, **variables):
        log.write_text("ok   one, 1 s\nFAIL two, 1 s\n1 of 2 passed\n")
        return {"status": "failed with 1", "seconds": 2.0}

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.Steps(True, {}, tmp_path).smoke("", 9)["counts"] == {"passed": 1, "checks": 2}


TESTS = """
import ctypes, os, time
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("n", range(4))
def test_quick(n):
    assert n != 3
def test_skips():
    pytest.skip("no")
"""
SLEEPS = """
def test_sleeps():
    time.sleep(100)
"""
HANGS = """
def test_hangs():
    ctypes.CDLL(None).sleep(100)  # as a kernel that does not end: no signal is heard
"""


def step_of_tests(tmp_path, monkeypatch, text: str, options: tuple[list[str], list[str]], seconds: float) -> dict:
    """The step over one file; its pytest is the real one."""
    file, logs = tmp_path / "test_of_a_gpu.py", tmp_path / "logs"
    file.write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: of a GPU\n")
    logs.mkdir()
    monkeypatch.setattr(run_tests, "files", lambda: [str(file)])
    monkeypatch.setattr(run_tests, "options", lambda: options)
    done = gpu_check.Steps(False, {}, logs).tests("", seconds)
    assert "test_quick[3]" in (logs / "tests.txt").read_text() and (logs / "tests.xml").exists()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "worksteal"]], ids=["one process", "two workers"])
def test_a_stopped_pytest_leaves_its_counts(tmp_path, monkeypatch, workers):
    """It gets SIGINT, and writes its JUnit file and its summary before it ends."""
    done = step_of_tests(tmp_path, monkeypatch, TESTS + SLEEPS, (workers, []), 12)
    assert done["status"] == "stopped after 12 s" and done["seconds"] < 12 + processes.GRACE
    assert done["counts"] == {"passed": 3, "failures": 1, "errors": 0, "skipped": 1, "unfinished": 1}
    assert done["files"]["test_of_a_gpu"]["passed"] == 3 and "KeyboardInterrupt" in done["output"]


@pytest.mark.slow
def test_a_test_that_hangs_is_ended_alone(tmp_path, monkeypatch):
    """As run_tests.options has it: its worker is killed, and the others' tests are run."""
    pytest.importorskip("pytest_timeout")
    options = ["-n", "2", "--dist", "worksteal", "--timeout", "4", "--timeout-method", "thread"]
    done = step_of_tests(tmp_path, monkeypatch, TESTS + HANGS, (options, []), 60)
    assert done["status"] == "failed with 1" and done["counts"]["errors"] == 1
    assert (done["counts"]["passed"], done["counts"]["failures"], done["counts"]["skipped"]) == (3, 1, 1)


def test_a_missing_plugin_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(run_tests.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(run_tests, "find_spec", lambda name: name)
    there = ["-n", "14", "--dist", "worksteal", "--timeout", "150", "--timeout-method", "thread"]
    assert run_tests.options() == (there, [])
    monkeypatch.setattr(run_tests, "find_spec", lambda name: None if name == "pytest_timeout" else name)
    assert run_tests.options() == (there[:4], ["pytest_timeout"])
    monkeypatch.setattr(run_tests, "find_spec", lambda name: None)
    monkeypatch.setattr(run_tests.os, "cpu_count", lambda: 1)
    assert run_tests.options() == ([], ["xdist", "pytest_timeout"])


def test_every_file_with_a_gpu_test_is_run():
    """They lie in folders below tests/."""
    files = run_tests.files()
    assert {"tests/beagle_kernels/test_triton_ops.py", "tests/beagle_sd/decoding/test_rounds_gpu.py"} <= set(files)
    assert all((ROOT / file).is_file() for file in files) and "tests/bench/test_bundles.py" not in files


def test_tests_that_all_skip_are_no_pass(tmp_path, monkeypatch):
    def run(command, seconds, log, **variables):
        case = '<testcase classname="tests.test_a" name="a"><skipped message="no"/></testcase>'
        (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
        return {"status": "passed", "seconds": 2.0}

    monkeypatch.setattr(gpu_check, "run", run)
    done = gpu_check.Steps(False, {}, tmp_path).tests("", 9)
    assert done["status"] == "failed: nothing ran" and done["files"]["test_a"]["skipped"] == 1


@pytest.mark.slow
def test_a_dry_run_walks_the_steps(tmp_path):
    """Without git: tiles are compiled by workers and tuned in the interpreter and given to the benchmark, rounds are
    played; nothing names a GPU. Called again, it repeats nothing."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "*.egg-info", "build", "dist", ".venv", ".*_cache")
    for name in ("beagle_kernels", "python", "bench", "tests", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": "/"}
    environment.pop("BEAGLE_COMMIT", None)
    command = [copy / "bench" / "gpu" / "check.sh", out, "--dry-run", "tests", "ours:tree_attention", "tune:first"]
    command += ["bench:tree_attention", "ours:round"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["environment"]["dry_run"] and record["environment"]["commit"] is None
    tuned, rows = tiles.entries_of(record["steps"]), record["steps"]["bench:tree_attention"]["rows"]
    assert {entry["kernel"] for entry in tuned} == set(tuning.TIMED_BY)
    assert all("cpu" in row["device"] and "tuned" in row["tiles"] for row in rows if "p50" in row)
    assert any(row.get("acceptance") == "replayed" for row in record["steps"]["round"]["rows"])
    lines = tiles.lines_of(tuned).splitlines()
    assert len(lines) == len(tuned) and lines[0].startswith('"block_dkv": 90: {16: Config(')
    collected = (tmp_path / "gpu.logs" / "tests.txt").read_text()
    assert "test_triton_ops" in collected and "test_tuning_on_a_gpu" not in collected
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout == "" and json.loads(out.read_text())["steps"] == record["steps"]
