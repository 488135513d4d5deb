"""bench.counts: what choices read and draw stays what docs/performance.md says of it, in both executors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from bench import counts
from bench.processes import ROOT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
def test_few_groups_are_looked_into_and_logits_are_read_about_twice_at_most(tmp_path):
    out = tmp_path / "counts.json"
    command = [sys.executable, "-m", "bench.counts", "--rows", "4", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["counts"]
    assert {row["executor"] for row in rows} == {"cpu", "cuda"} and len({row["logits"] for row in rows}) == 3
    # with so few rows, blocks of CUDA that share a row find its k-th logit each; the host reads flat logits again for
    # each token that top-p drops, which is one row in ten at 0.9
    reads = {"greedy": 1.05, "T = 0.7": 1.05, "T = 1": 1.05, "T = 1, top-p 0.9": 2.1, "T = 1, top-k 50": 2.1}
    for row in rows:
        again = row["executor"] == "cpu" and row["logits"] != "SmolLM2-135M" and "top-p" in row["sampling"]
        assert 1 <= row["reads_per_token"] <= reads.get(row["sampling"], 4) + again, row
        if row["sampling"] == "greedy":
            assert row["philox_calls_per_group"] == row["share_of_groups_looked_into"] == 0
        elif row["sampling"] in ("T = 0.7", "T = 1") and row["logits"] == "SmolLM2-135M":
            assert 0 < row["share_of_groups_looked_into"] < 0.03 and row["philox_calls_per_group"] >= 0.5, row


def test_a_failure_says_why(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho the executors differ\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"\[2, 5\] logits.*the executors differ"):
        counts.counted(program, torch.zeros(2, 5), tmp_path)
