"""The GPU check says what it did not do, resumes, keeps its time, and walks every step on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beagle_kernels.triton import configs
from bench import gpu_check, report, tuning

ROOT = Path(__file__).resolve().parent.parent


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

    def step(self, name, seconds):
        ran.append(name)
        return {"status": "failed with 1" if name == "choose_tokens" else "passed"}

    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "a test's", "commit": "abc"})
    for kind in gpu_check.SECONDS:
        monkeypatch.setattr(gpu_check.Steps, kind, step)
    return ran


def test_gpu_check_goes_on_and_resumes(tmp_path, with_gpu):
    out = tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "build", "bench"]) == 1
    assert with_gpu == ["", *gpu_check.OPS]
    with_gpu.clear()
    assert gpu_check.main([str(out), "bench:choose_tokens", "bench:verify_tree"]) == 1
    assert with_gpu == ["choose_tokens"]
    assert len(json.loads(out.read_text())["steps"]) == 1 + len(gpu_check.OPS)
    with pytest.raises(SystemExit):
        gpu_check.main([str(out), "bench:nothing"])


def test_gpu_check_keeps_its_time(tmp_path, with_gpu):
    out = tmp_path / "gpu.json"
    assert gpu_check.main([str(out), "round", "--seconds", "3"]) == 1 and with_gpu == []
    assert "not begun" in json.loads(out.read_text())["steps"]["round"]["status"]
    assert gpu_check.main([str(out), "round"]) == 0 and with_gpu == [""]


@pytest.mark.slow
def test_a_dry_run_walks_the_steps(tmp_path):
    """Tiles are tuned in the interpreter and given to the benchmark, rounds are played; nothing names a GPU."""
    out = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHON": sys.executable, "BEAGLE_COMMIT": "abc", "OMP_NUM_THREADS": "1"}
    command = [ROOT / "bench" / "gpu_check.sh", out, "--dry-run", "tune", "bench:tree_attention", "round"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["environment"]["dry_run"] and record["environment"]["commit"] == "abc"
    tuned, rows = record["steps"]["tune"]["configs"], record["steps"]["bench:tree_attention"]["rows"]
    assert {entry["kernel"] for entry in tuned} == set(tuning.TIMED_BY) <= set(configs.TABLE)
    assert record["steps"]["bench:tree_attention"]["tuned"]
    assert all("cpu" in row["device"] for row in rows if "p50" in row)
    assert any(row.get("acceptance") == "replayed" for row in record["steps"]["round"]["rows"])
    lines = report.configs(tuned).splitlines()
    assert len(lines) == len(tuning.TIMED_BY) and lines[0].startswith('"block_dkv": 90: {16: Config(')


def test_tuned_tiles_are_used(monkeypatch):
    monkeypatch.setattr(configs, "_tuned", {})
    entry = {"kernel": "tree", "arch": 90, "head_size": 128, "dtype": "bfloat16", "config": [64, 32, 4, 2]}
    tuning.use([entry])
    assert configs.choose("tree", 90, 128, torch.bfloat16) == configs.Config(64, 32, 4, 2)


def test_gpu_check_stops_a_step_that_hangs():
    done = gpu_check.run([sys.executable, "-c", "import time; print('before', flush=True); time.sleep(60)"], 1)
    assert done["status"] == "stopped after 1 s" and "before" in done["output"] and done["seconds"] < 30
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], 60)["status"] == "failed with 3"
    assert "output" not in gpu_check.run([sys.executable, "-c", ""], 60)
