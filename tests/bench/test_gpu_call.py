"""bench/gpu/call.sh: its steps go on after one another whatever becomes of them, and what they made travels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import call as gpu_call
from bench.gpu import check as gpu_check
from bench.gpu.call import Call, Step, bring_back, calls, main, take_in
from bench.recipes.one_gpu import __main__ as gpu_train
from bench.report import bars


def script(text: str):
    return lambda seconds: [sys.executable, "-c", text]


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "results.tgz") as tar:
        return set(tar.getnames())


def test_a_step_that_fails_or_hangs_stops_nothing(tmp_path, monkeypatch, capfd):
    work, results = tmp_path / "work", tmp_path / "results"
    writes = f"from pathlib import Path; Path({str(work / 'made.json')!r}).write_text('1'); print('said')"
    steps = [
        Step("crash", script("import os; os.abort()")),
        Step("hang", script("import time; time.sleep(60)"), 1.0, least=0.5),
        Step("last", script(writes)),
    ]
    monkeypatch.setattr(gpu_call, "calls", lambda work, dry: {"all": Call(steps)})
    assert main(["all", str(results), "--work", str(work), "--carried", str(tmp_path / "none")]) == 1
    said = capfd.readouterr().out
    assert "== crash: failed with -6" in said and "== hang: stopped after 1 s" in said
    assert "== last: passed" in said and "said" in said
    assert packed(results) == {"made.json", "log/crash.txt", "log/hang.txt", "log/last.txt"}
    for late in (["--seconds", "0.1"], ["--began", str(time.time() - gpu_call.SECONDS)]):
        assert main(["all", str(results), "--work", str(work), *late]) == 1
        assert capfd.readouterr().out.count("not begun") == 3


def test_the_figures_are_last(tmp_path, monkeypatch, capfd):
    """However much the steps say, and also where nothing was measured in this call."""
    monkeypatch.setattr(
        gpu_call, "calls", lambda work, dry: {"bench": Call([Step("one", script("print('x' * 9999)"))])}
    )
    (tmp_path / "gpu.json").write_text('{"steps": {}}')
    assert main(["bench", str(tmp_path / "results"), "--work", str(tmp_path), "--carried", "none"]) == 0
    said = capfd.readouterr().out
    assert said.rstrip().endswith(bars.lines({"steps": {}})[-1]) and said.count("x" * 600) == 1


def test_the_time_counts_from_before_python():
    """Its first imports take up to half a minute."""
    done = subprocess.run(
        [gpu_call.ROOT / "bench/gpu/call.sh", "carry", "there"],
        env=os.environ | {"PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[:3] == ["-m", "bench.gpu.call", "--began"] and words[4:] == ["carry", "there"]
    assert 0 <= time.time() - float(words[3]) < 60


def test_a_step_that_is_killed_with_its_call_is_in_the_results(tmp_path):
    """The machine ends the command at a limit of its own; rows are there as each is written."""
    rows = tmp_path / "work" / "out" / "evaluate" / "mt-bench.json"
    code = f"""
import sys
from pathlib import Path
from bench.gpu import call
code = "import pathlib, time; pathlib.Path({str(rows)!r}).write_text('[16]'); time.sleep(60)"
call.EVERY = 0.1
call.calls = lambda work, dry: {{"all": call.Call([call.Step("evaluate", lambda s: [sys.executable, "-c", code])])}}
call.main(["all", {str(tmp_path / "results")!r}, "--work", {str(tmp_path / "work")!r}, "--carried", "none"])
"""
    rows.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_call.ROOT)
    packed_there, deadline = tmp_path / "results" / "results.tgz", time.monotonic() + 60
    while time.monotonic() < deadline and not (
        packed_there.exists() and "out/evaluate/mt-bench.json" in packed(packed_there.parent)
    ):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    list(take_in(packed_there.parent, tmp_path / "fresh"))
    assert (tmp_path / "fresh/out/evaluate/mt-bench.json").read_text() == "[16]"


def test_an_unknown_commit_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("bench.environment.command_output", lambda *command: None)
    for known in (False, True):
        monkeypatch.setenv("BEAGLE_COMMIT", "abc" if known else "")
        assert main(["carry", str(tmp_path / "results"), "--work", str(tmp_path), "--carried", "none"]) == 0
        assert ("BEAGLE_COMMIT" in capfd.readouterr().out) != known


def test_what_is_brought_back_can_be_carried_on(tmp_path):
    """To a machine that has nothing; what a machine has already stays."""
    work, results, fresh = tmp_path / "work", tmp_path / "results", tmp_path / "fresh"
    results.mkdir()
    files = [
        "in/kit.part0",
        "out/kit/about.json",
        "out/scratch/ready",
        "out/search/best.json",
        "out/answers/answers-00.npz",
        "out/answers/answers-01.npz",
        "out/train/draft/model.safetensors",
        "out/train/checkpoint/checkpoint.part0",
        "out/train/checkpoint/checkpoint.json",
        "gpu.json",
    ]
    for name in files:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    bring_back(work, results, ("answers-*.npz", "model.safetensors", "checkpoint.part*"))
    assert {path.name for path in results.iterdir()} == {
        "results.tgz",
        "answers-00.npz",
        "answers-01.npz",
        "model.safetensors",
        "checkpoint.part0",
    }
    (fresh / "out/answers").mkdir(parents=True)
    (fresh / "out/answers/answers-00.npz").write_text("newer")
    list(take_in(results, fresh))
    there = {str(path.relative_to(fresh)): path.read_text() for path in fresh.rglob("*") if path.is_file()}
    assert there == {name: name for name in files[3:]} | {"out/answers/answers-00.npz": "newer"}


@pytest.mark.parametrize(("count", "parts"), [(4, 3), (4, 4), (9, 1)])
def test_no_more_files_than_may_come_back(count, parts, tmp_path):
    """Answers as far as they fit; a checkpoint only whole."""
    work, results = filled(tmp_path, count, parts), tmp_path / "results"
    remarks = bring_back(work, results, ("answers-*.npz", "checkpoint.part*"))
    names = [path.name for path in results.iterdir()]
    assert len(names) <= gpu_call.FILES and sum("answers" in name for name in names) == min(count, 7)
    assert sum("part" in name for name in names) == (3 if parts == 3 else 0)
    assert any("stay in" in remark for remark in remarks) == (parts != 3)


def test_no_more_bytes_than_may_come_back(tmp_path, monkeypatch):
    """The draft before what resuming it needs; parts of a checkpoint that has grown do not stay as they were."""
    work, results = filled(tmp_path, 0, 3, size=15000), tmp_path / "results"
    draft = work / "out/train/draft/model.safetensors"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(bytes(15000))
    names, given = {"results.tgz", "model.safetensors"}, ("model.safetensors", "checkpoint.part*")
    for together, file, more in ((62000, 16000, True), (60000, 16000, False), (62000, 14000, False)):
        monkeypatch.setattr(gpu_call, "TOGETHER_BYTES", together)
        monkeypatch.setattr(gpu_call, "A_FILE", file)
        bring_back(work, results, given)
        there = {path.name for path in results.iterdir()}
        kept = names if file == 16000 else {"results.tgz"}
        assert there == (kept | {f"checkpoint.part{number}" for number in range(3)} if more else kept)
        assert sum(path.stat().st_size for path in results.iterdir()) <= together


def filled(tmp_path: Path, answers: int, parts: int, size: int = 0) -> Path:
    """A work folder with so many files of so many bytes, and a folder for the results."""
    for folder, name, number in (
        ("answers", "answers-0{}.npz", answers),
        ("train/checkpoint", "checkpoint.part{}", parts),
    ):
        (tmp_path / "work/out" / folder).mkdir(parents=True)
        for each in range(number):
            (tmp_path / "work/out" / folder / name.format(each)).write_bytes(bytes(size))
    (tmp_path / "results").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("dry", [False, True])
def test_the_steps_are_commands_of_this_repository(dry, tmp_path):
    """Each command's time is its step's, and what a call shows fits into what a reply shows."""
    for name, call in calls(tmp_path, dry).items():
        figures = 1.2 * len("\n".join(bars.lines({"steps": {}}))) if name in gpu_call.FIGURES else 0
        assert sum(step.shown + 80 for step in call.steps) + figures <= 11_800, name
        for step in call.steps:
            seconds = min(step.seconds, 500)
            command = step.command(seconds)
            assert command[1] == "-m" and command[2].startswith("bench.")
            if command[2] == "bench.recipes.one_gpu":
                options = gpu_train.parsed(command[3:])
                assert options.parts == [step.name] and 60 * options.minutes <= seconds - gpu_call.SAVING + 0.5
            elif command[2] == "bench.gpu.check":
                options = gpu_check.parsed(command[3:])
                assert options.parts and options.seconds <= seconds - gpu_call.SAVING


PAGE = (gpu_call.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_page_has_every_call():
    assert set(re.findall(r"bench/gpu/call.sh (\w+) RESULTS", PAGE)) == set(calls(Path(), False))


def test_half_an_hour_is_enough():
    """The page's sum of seconds: each call's own, a start, and what lies between two calls."""
    rows = {name: int(seconds) for name, seconds in re.findall(r"^\| ([\w ]+) \| (\d+) \|", PAGE, re.M)}
    total = rows.pop("together")
    assert total == sum(rows.values()) and total <= 1800
    assert rows["kernels"] == gpu_call.SECONDS and rows["start of the machine"] >= 120
    for name in ("answers", "draft"):
        assert f"bench/gpu/call.sh {name} RESULTS --seconds {rows[name]}" in PAGE


@pytest.mark.parametrize("seconds", [560, 430, 300])
def test_training_leaves_evaluation_its_time(seconds, tmp_path):
    """However little there is of it, and also where training takes all that it may."""
    steps = {step.name: step for step in calls(tmp_path, False)["draft"].steps}
    left = seconds - 40  # setup
    train = min(steps["train"].seconds, left - steps["train"].leaves)
    assert train >= steps["train"].least and left - train >= gpu_call.EVALUATION
    options = gpu_train.parsed(steps["train"].command(train)[3:])
    assert 60 * options.minutes <= train - gpu_call.SAVING + 0.5
