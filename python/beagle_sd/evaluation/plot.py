"""Plots: of a training run, loss and acceptance by depth (the paper's figure 3); of a comparison, its ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beagle_sd.training.log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from beagle_sd.evaluation.comparison import Row


def plot_run(run: str | Path, out: str | Path) -> None:
    """Write the plot; the format is that of out's suffix. Needs matplotlib (`pip install beagle-kernels[train]`)."""
    lines = read_log(run)
    figure = blank_figure(10, 4)
    losses, acceptance = figure.subplots(1, 2)
    for stage, name in ((1, "stage 1, block attention"), (2, "stage 2, simulation")):
        part = [line for line in lines if line["stage"] == stage]
        if part:
            losses.plot([line["step"] for line in part], [line["loss"] for line in part], linewidth=0.8, label=name)
    losses.set(xlabel="step", ylabel="loss a row", title="Loss")
    losses.legend()
    evaluated = [line for line in lines if "acceptance_by_depth" in line]
    for depth in range(len(evaluated[0]["acceptance_by_depth"]) if evaluated else 0):
        acceptance.plot(
            [line["step"] for line in evaluated],
            [line["acceptance_by_depth"][depth] for line in evaluated],
            marker=".",
            label=f"depth {depth}",
        )
    acceptance.set(xlabel="step", ylim=(0, 1), title="Held-out acceptance, given the parent's")
    if evaluated:
        acceptance.legend()
    figure.savefig(out, dpi=120)


def plot_comparison(rows: Sequence[Row], out: str | Path) -> None:
    """Write each contender's median ratio with its 20 and 80 percentiles, a panel for each set of prompts."""
    sets = list(dict.fromkeys(row.prompts for row in rows))
    figure = blank_figure(1 + 4 * len(sets), 1 + 0.35 * len({row.contender for row in rows}))
    for axes, name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True):
        chosen = [row for row in rows if row.prompts == name]
        heights = range(len(chosen), 0, -1)
        axes.barh(heights, [row.median for row in chosen], color="tab:blue", alpha=0.6)
        axes.hlines(heights, [row.low for row in chosen], [row.high for row in chosen], color="black")
        axes.axvline(1.0, color="gray", linewidth=0.8)
        axes.set_yticks(heights, [row.contender for row in chosen])
        axes.set(xlabel="times target.generate", title=name)
    figure.savefig(out, dpi=120)


def blank_figure(width: float, height: float) -> Figure:
    """In inches, without a screen; ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "a plot needs matplotlib; allowed: without it no plot, or pip install 'beagle-kernels[bench]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
