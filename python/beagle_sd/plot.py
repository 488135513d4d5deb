"""Plots of a training run from its log: loss, and acceptance by depth (the paper's figure 3)."""

from __future__ import annotations

import json
from pathlib import Path


def read_log(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last line cut short is left out. ValueError where there is none."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there; allowed: a folder that `beagle-sd train` wrote")
    lines = whole_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: no step has ended yet")
    return lines


def whole_lines(path: Path) -> list[dict]:
    """The lines of a log, without a last one that a killed run cut short."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def plot_run(run: str | Path, out: str | Path) -> None:
    """Write the plot; the format is that of out's suffix. Needs matplotlib (`pip install beagle-kernels[train]`)."""
    from matplotlib.figure import Figure

    lines = read_log(run)
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, acceptance = figure.subplots(1, 2)
    for stage, name in ((1, "stage 1, block attention"), (2, "stage 2, simulation")):
        part = [line for line in lines if line["stage"] == stage]
        if part:
            losses.plot([line["step"] for line in part], [line["loss"] for line in part], linewidth=0.8, label=name)
    losses.set(xlabel="step", ylabel="loss a row", title="Loss")
    losses.legend()
    evaluated = [line for line in lines if "acceptance_by_depth" in line]
    for depth in range(len(evaluated[0]["acceptance_by_depth"]) if evaluated else 0):
        acceptance.plot([line["step"] for line in evaluated],
                        [line["acceptance_by_depth"][depth] for line in evaluated], marker=".", label=f"depth {depth}")
    acceptance.set(xlabel="step", ylim=(0, 1), title="Held-out acceptance, given the parent's")
    if evaluated:
        acceptance.legend()
    figure.savefig(out, dpi=120)
