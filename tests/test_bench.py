"""The benchmarks' own machinery: no number without a right result, and a GPU check that says what it did not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beagle_kernels import Sampling, choose_tokens
from bench import __main__ as command
from bench import gpu_check
from bench.bench_verify_tree import of_logits, trees
from bench.registry import Case, same_as_truth

ROOT = Path(__file__).resolve().parent.parent


def a_case(wrong_by: int) -> Case:
    """choose_tokens on a few rows, its tokens off by `wrong_by`."""
    args = torch.randn(3, 100), torch.arange(3), Sampling.of(3)

    def op(*args, backend="auto"):
        tokens, status = choose_tokens(*args, backend=backend)
        return tokens + wrong_by * (backend != "reference"), status

    def check():
        same_as_truth(op, *args)

    return Case("planted", {"beagle": lambda: op(*args)}, check, rounds=3, work={"byte": 1.0})


def test_a_wrong_result_gets_no_number():
    case = a_case(wrong_by=1)
    with pytest.raises(AssertionError, match="op is wrong"):
        case.run()
    assert case.times == {} and case.rows() == []
    rows = command.measured(case)
    assert len(rows) == 1 and "op is wrong" in rows[0]["error"] and not {"p50", "byte/s"} & rows[0].keys()


def test_an_error_after_good_numbers_takes_them_back():
    case = a_case(wrong_by=0)
    case.run()
    assert case.rows()
    case.check = a_case(wrong_by=1).check
    with pytest.raises(AssertionError):
        case.run()
    assert case.rows() == []


def test_rows_and_shares():
    (row,) = command.measured(a_case(wrong_by=0))
    assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["byte/s"] == 1 / row["p50"]
    assert row["group"] == "planted" and row["data"] == "normal random" and row["torch"] == torch.__version__
    shares = gpu_check.with_shares(row, {"byte/s": 2 * row["byte/s"], "flop/s": 1.0})
    assert shares["share of copy"] == 0.5 and "share of matmul" not in shares


@pytest.mark.parametrize("sampling", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)], ids=str)
def test_a_batch_of_trees(sampling):
    """The shapes that a GPU gets, small: all peers run, ours equals the truth."""
    temperature, top_p = sampling
    case = of_logits(torch.randn(3, 9, 200), trees(3, 9), Sampling.of(3, 0, temperature, 0, top_p))
    case.rounds = 1
    case.run()
    assert len(case.rows()) == len(case.peers) >= 2 and case.rows()[0]["byte"] == 4 * 3 * 9 * 200


def test_gpu_check_without_a_gpu(tmp_path):
    out = tmp_path / "folder" / "gpu.json"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "BEAGLE_COMMIT": "abc"}
    done = subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", out], env=hidden, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    record = json.loads(out.read_text())
    assert record["environment"]["gpu"] is None and record["environment"]["commit"] == "abc"
    assert {"build", "tests:tests/test_extension_gpu.py", "bench:verify_tree"} <= record["steps"].keys()
    for step in record["steps"].values():
        assert step == {"status": "skipped", "why": "torch finds no CUDA device"}


@pytest.fixture
def with_gpu(monkeypatch):
    """gpu_check as if there were a GPU, with steps that only note that they ran."""
    ran = []

    def step(name):
        ran.append(name)
        return {"status": "failed with 1" if name == "choose_tokens" else "passed"}

    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "a test's", "commit": "abc"})
    monkeypatch.setattr(gpu_check, "build", lambda: step("build"))
    monkeypatch.setattr(gpu_check, "tests", step)
    monkeypatch.setattr(gpu_check, "bench", lambda name, limits: step(name))
    monkeypatch.setattr(gpu_check, "measured_limits", lambda: {"byte/s": 1.0})
    return ran


def test_gpu_check_goes_on_and_resumes(tmp_path, with_gpu):
    out = tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "build", "bench"]) == 1
    assert with_gpu == ["build", *command.FILES]
    with_gpu.clear()
    assert gpu_check.main([str(out), "bench:choose_tokens", "bench:verify_tree"]) == 1
    assert with_gpu == ["choose_tokens"]
    assert len(json.loads(out.read_text())["steps"]) == 1 + len(command.FILES)
    with pytest.raises(SystemExit):
        gpu_check.main([str(out), "bench:nothing"])


def test_gpu_check_stops_a_step_that_hangs():
    done = gpu_check.run([sys.executable, "-c", "import time; print('before', flush=True); time.sleep(60)"], 1)
    assert done["status"] == "stopped after 1 s" and "before" in done["output"] and done["seconds"] < 30
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], 60)["status"] == "failed with 3"
    assert "output" not in gpu_check.run([sys.executable, "-c", ""], 60)
