"""A step shared by processes and micro-batches trains as a whole one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from training_cases import CONFIG, metrics_of, trainer_of, weights_of


@pytest.mark.parametrize("processes, micro_batches", [(1, 3), (2, 1), (2, 2)])
def test_a_shared_batch_trains_as_a_whole_one(processes, micro_batches, data, whole, tmp_path):
    """Losses are sums over the weight of the whole batch: processes and micro-batches change rounding only."""
    run_shared(data, tmp_path / "out", processes, micro_batches)
    assert_same_but_for_rounding(tmp_path / "out", whole)


def assert_same_but_for_rounding(folder: Path, whole) -> None:
    for mine, theirs in zip(metrics_of(folder), metrics_of(whole[1]), strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"] and mine["lr"] == theirs["lr"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine.keys() == theirs.keys()
    first, same = metrics_of(folder)[0], metrics_of(whole[1])[0]
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert first["gradient_norm"] == pytest.approx(same["gradient_norm"], rel=1e-5)


def test_two_processes_resume_as_they_were(data, tmp_path):
    for folder, stop in (("straight", 0), ("stopped", 6)):
        run_shared(data, tmp_path / folder, 2, 2, stop)
    run_shared(data, tmp_path / "stopped", 2, 2)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "straight")
    assert all(
        torch.equal(weight, weights_of(tmp_path / "straight")[name])
        for name, weight in weights_of(tmp_path / "stopped").items()
    )


def run_shared(data: Path, folder: Path, processes: int, micro_batches: int, stop: int = 0) -> None:
    def train() -> None:
        trainer = trainer_of(data, folder, replace(CONFIG, micro_batches=micro_batches))
        assert trainer.processes.num_processes == processes

        def progress(step, metrics):
            if step == stop:
                os._exit(0)

        trainer.run(progress)

    assert forks.run_ranks(processes, train) == [0] * processes


_UNDER_TORCHRUN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_cases import CONFIG, trainer_of
trainer_of(Path(sys.argv[1]), Path(sys.argv[2]), replace(CONFIG, micro_batches=2)).run()
"""


@pytest.mark.slow
def test_under_torchrun(data, whole, tmp_path):
    """The launcher itself: two processes, two micro-batches each."""
    (tmp_path / "shared.py").write_text(_UNDER_TORCHRUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "shared.py"), str(data), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_but_for_rounding(tmp_path / "out", whole)
