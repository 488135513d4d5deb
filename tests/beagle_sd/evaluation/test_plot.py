"""Plots of a run's log."""

import json

import pytest

from beagle_sd.evaluation.plot import plot_run
from beagle_sd.training.log import read_log

matplotlib = pytest.importorskip("matplotlib")


def log_line(step: int, **more) -> str:
    return json.dumps({"step": step, "stage": 1 + step // 3, "loss": 9.0 - step, **more}) + "\n"


def test_loss_and_acceptance_are_drawn(tmp_path):
    log = log_line(1) + log_line(2, acceptance_by_depth=[0.5, 0.4]) + log_line(3) + '{"step": 4, "st'
    (tmp_path / "metrics.jsonl").write_text(log)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_run(tmp_path, tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()
    for label in ("stage 1, block attention", "stage 2, simulation", "depth 0", "depth 1"):
        assert f">{label}</text>" in drawn
    assert "depth 2" not in drawn


def test_no_log_is_said(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl is not there; allowed: a folder that"):
        plot_run(tmp_path, tmp_path / "run.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step has ended yet"):
        plot_run(tmp_path, tmp_path / "run.png")
