"""The paper's figures, each from the runs it compares: a CSV and a plot."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill

from bench.recipes.paper.runs import RUNS, SHAPES, Runner


@dataclass(frozen=True)
class Figure:
    """Runs by the name that the figure gives them; course: draw acceptance over "epoch" or "seconds", not tokens a
    round."""

    title: str
    runs: dict[str, str]
    course: str | None = None


FIGURES = {
    "figure3": Figure(
        "Acceptance by depth over training (figure 3)",
        {"Beagle": "block-block", "EAGLE-2": "eagle2-eagle2"},
        course="epoch",
    ),
    "seconds": Figure(
        "Acceptance by depth over seconds of training",
        {"Beagle": "block-steps4", "Beagle, next token first": "next-steps4", "EAGLE-2": "eagle2-eagle2"},
        course="seconds",
    ),
    "figure4": Figure(
        "Window of block attention, from random weights (figure 4)",
        {"1": "random-next", "2": "random-window2", "3": "random-window3", "4": "random-window4", "5": "random-block"},
    ),
    "figure10_steps": Figure("Simulated steps (figure 10)", {str(n): f"block-steps{n}" for n in (1, 2, 3, 4)}),
    "figure10_stages": Figure(
        "Objective, at equal tokens seen (figure 10, middle)",
        {
            "next token": "next-next",
            "block": "block-block",
            "block + simulation": "block-steps4",
            "next token + simulation": "next-steps4",
            "EAGLE-2": "eagle2-eagle2",
        },
    ),
    "start": Figure(
        "Start and key heads, at equal tokens seen",
        {
            "passing, a key head for every query head": "block-steps4",
            "passing, key heads shared": "shared-steps4",
            "random, shared: next token": "random-next-next",
            "random, shared: block": "random-block-block",
            "random, shared: block + simulation": "random-block-steps4",
        },
    ),
    "append": Figure("Draft states as keys", {"append": "block-steps4", "no append": "block-no-append"}),
    "order": Figure(
        "Objective, at more tokens",
        {"next token": "next-next", "block + simulation": "block-steps4", "next token + simulation": "next-steps4"},
    ),
    "losses": Figure(
        "Loss and weights of the simulated steps",
        {
            "cross-entropy": "next-steps4",
            "total variation": "next-total-variation",
            "acceptance": "next-acceptance",
            "hybrid": "next-hybrid",
            "cross-entropy, weights by reach": "next-reached",
        },
    ),
    "optimizer": Figure("Optimizer", {"AdamW, 2e-3": "next-steps4", "Muon, 5e-3": "muon-steps4"}),
    "precision": Figure("Products", {"fp32": "fp32-steps4", "bf16": "bf16-steps4"}),
}


def make(name: str, runner: Runner, seeds: list[int], out: Path) -> None:
    """Do what runs the figure lacks; write NAME.csv and NAME.svg into `out`."""
    figure = FIGURES[name]
    rows = [
        row
        for seed in seeds
        for label, run in figure.runs.items()
        for row in (course_rows if figure.course else result_rows)(runner, label, run, seed)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(figure, rows, out / f"{name}.svg")


def course_rows(runner: Runner, label: str, run: str, seed: int) -> list[dict]:
    """A row an evaluation, of the run of phase 1 and then of the one that goes on from it."""
    rows: list[dict] = []
    for part in filter(None, (RUNS[run].after, run)):
        before = rows[-1] if rows else {"epoch": 0.0, "tokens_seen": 0, "seconds": 0.0}
        rows += [
            {
                "run": label,
                "seed": seed,
                "epoch": round(before["epoch"] + point["epoch"], 2),
                "tokens_seen": before["tokens_seen"] + point["tokens_seen"],
                "seconds": round(before["seconds"] + point["seconds"], 1),
                **by_depth(point["acceptance_by_depth"]),
            }
            for point in runner.result(part, seed)["course"]
        ]
    return rows


def result_rows(runner: Runner, label: str, run: str, seed: int) -> list[dict]:
    """One row: memory of a step of training, tokens a round of each shape with its standard error, and acceptance by
    depth in the chain's rounds."""
    found, last = runner.result(run, seed), course_rows(runner, label, run, seed)[-1]
    row = {"run": label, "seed": seed, "epochs": last["epoch"], "tokens_seen": last["tokens_seen"]}
    row["peak_bytes"] = found["peak_bytes"]
    for shape in SHAPES:
        row |= {shape: found[shape]["tokens_per_round"], f"{shape}_error": found[shape]["standard_error"]}
    deepest = SHAPES["chain"][0]
    shares = found["chain"]["acceptance_by_depth"]
    return [row | by_depth(shares + [0.0] * (deepest - len(shares)))]


def by_depth(shares: list[float]) -> dict[str, float]:
    return {f"depth_{depth}": share for depth, share in enumerate(shares)}


def draw(figure: Figure, rows: list[dict], path: Path) -> None:
    """The first seed's course, or tokens a round: bars of means, every seed with its standard error on them."""
    import matplotlib
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(7, 3.5), layout="constrained")
    axes = plot.subplots(1, len(figure.runs) if figure.course else len(SHAPES), sharey=bool(figure.course))
    plot.suptitle(figure.title)
    if figure.course:
        for axis, label in zip(axes, figure.runs):
            course = [row for row in rows if row["run"] == label and row["seed"] == rows[0]["seed"]]
            for name in (key for key in rows[0] if key.startswith("depth_")):
                axis.plot(
                    [row[figure.course] for row in course],
                    [row[name] for row in course],
                    marker=".",
                    label=name.replace("_", " "),
                )
            axis.set(title=label, xlabel=figure.course, ylim=(0, None))
        axes[0].set_ylabel("acceptance, given the parent's")
        axes[-1].legend(fontsize="small")
    else:
        labels = {label: fill(label, 14) for label in figure.runs}
        for axis, shape in zip(axes, SHAPES):
            means = [fmean(row[shape] for row in rows if row["run"] == label) for label in labels]
            axis.bar(list(labels.values()), means)
            errors = [row[f"{shape}_error"] for row in rows]
            axis.errorbar([labels[row["run"]] for row in rows], [row[shape] for row in rows], errors, fmt="k.")
            axis.set(title=f"{shape}, tokens a round", ylim=(1, None))
            axis.tick_params(axis="x", labelsize=6)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.title}):
        plot.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
