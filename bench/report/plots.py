"""The scaling plots of docs/figures from the files that hold the numbers: python -m bench.report --plots

A figure is drawn for each device that has a file: cpu-scaling.json, and gpu.json where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bench.report import results

FIGURES = results.ROOT / "docs" / "figures"
PLOTS = {
    "attention": [("block_attention forward", "rows"), ("block_attention backward", "rows")],
    "loss": [("distill_loss", "rows")],
    "verification": [
        ("verify_tree greedy", "vocabulary"),
        ("verify_tree greedy", "nodes"),
        ("verify_tree sampled", "vocabulary"),
        ("verify_tree sampled", "nodes"),
    ],
    "tree-attention": [("tree_attention", "keys"), ("tree_attention", "batch")],
    "round": [("decode round", "cached"), ("decode round", "batch")],
    "linear": [("skinny_linear", "rows")],
}
"""Figure -> its panels: an op's series, and what of its sizes the horizontal axis is."""
LEAST = 3
"""Points that a panel needs."""


def files() -> dict[str, list[dict]]:
    """Rows by device, of the files there are."""
    found = {}
    if (results.RESULTS / "cpu-scaling.json").exists():
        found["cpu"] = results.read("cpu-scaling.json")
    if steps := results.gpu_record()["steps"]:
        found["gpu"] = [row for step in steps.values() for row in step.get("rows", [])]
    return found


def with_sizes(rows: list[dict]) -> Iterator[dict]:
    """The rows with a number and sizes to be drawn by. The loss's, whose file is that of pytest-benchmark, have them in
    the name of their group."""
    for row in rows:
        if "p50" not in row or row.get("data", "").startswith("normal random, deviation"):
            continue
        loss = re.match(r"(distill_loss) (\d+) x (\d+), (\d+) tokens, (\S+)", row["group"])
        if not row.get("series") and loss:
            name, length, *rest = loss.groups()
            row = row | {"series": name, "at": {"rows": int(length), "head": " x ".join(rest)}}
        if row.get("series"):
            yield row


def panel(rows: list[dict], series: str, axis: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """(what is held fixed, peer -> points): of the sizes that differ only in `axis`, the set with most points."""
    sets: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["series"] == series and axis in row["at"]:
            fixed = tuple((name, value) for name, value in row["at"].items() if name != axis)
            sets.setdefault(fixed, []).append(row)
    if not sets:
        return "", {}
    fixed, best = max(sets.items(), key=lambda item: len({row["at"][axis] for row in item[1]}))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(best, key=lambda row: row["at"][axis]):
        value = row["token/s"] if "token/s" in row else 1e3 * row["p50"]
        lines.setdefault(row["peer"], []).append((row["at"][axis], value))
    if max(map(len, lines.values())) < LEAST:
        return "", {}
    return ", ".join(f"{name} {value}" for name, value in fixed), lines


def draw(device: str, rows: list[dict], folder: Path) -> list[Path]:
    """Write the figures that have points: docs/figures/DEVICE-NAME.svg."""
    plt = _pyplot()
    rows, files_written = list(with_sizes(rows)), []
    for figure, panels in PLOTS.items():
        drawn = [(series, axis, *found) for series, axis in panels if (found := panel(rows, series, axis))[1]]
        if not drawn:
            continue
        sheet, axes = plt.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.4), squeeze=False)
        for axes_of_panel, (series, axis, fixed, lines) in zip(axes[0], drawn):
            for peer, points in sorted(lines.items(), key=lambda item: item[0] != "beagle"):
                ours = peer == "beagle"
                axes_of_panel.plot(*zip(*points), marker="o", markersize=3, linewidth=2.2 if ours else 1.1, label=peer)
            tokens = figure == "round"
            axes_of_panel.set(
                xscale="log",
                yscale="linear" if tokens else "log",
                xlabel=axis,
                title=f"{series}\n{fixed}",
                ylabel="tokens a second" if tokens else "ms",
            )
            axes_of_panel.title.set_fontsize(8)
            ticks = sorted({x for points in lines.values() for x, _ in points})
            axes_of_panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, minor=False)
            axes_of_panel.minorticks_off()
            axes_of_panel.grid(alpha=0.3)
            axes_of_panel.legend(fontsize=7)
        sheet.tight_layout()
        path = folder / f"{device}-{figure}.svg"
        sheet.savefig(path, metadata={"Date": None})
        plt.close(sheet)
        files_written.append(path)
    return files_written


def draw_lengths(rows: list[dict], folder: Path) -> list[Path]:
    """Write cpu-lengths.svg: tokens a round by length of the text, a panel for each kind of text."""
    if not rows:
        return []
    plt = _pyplot()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    sheet, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.4), squeeze=False, sharey=True)
    for axes_of_panel, kind in zip(axes[0], kinds):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["kind"] == kind:
                window = f"window {row['window_keys']}" if row["window_keys"] else "no window"
                points = lines.setdefault(f"{window}, T = {row['temperature']:g}", [])
                points.append((row["tokens"], row["tokens_per_round"]))
        for label, points in lines.items():
            axes_of_panel.plot(*zip(*sorted(points)), marker="o", markersize=3, label=label)
        axes_of_panel.set(title=kind, xlabel="tokens of text", xlim=(0, None), ylim=(1, None))
        axes_of_panel.grid(alpha=0.3)
        axes_of_panel.legend(fontsize=7)
    axes[0][0].set_ylabel("tokens a round")
    sheet.tight_layout()
    path = folder / "cpu-lengths.svg"
    sheet.savefig(path, metadata={"Date": None})
    plt.close(sheet)
    return [path]


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "beagle", "svg.fonttype": "none", "font.size": 9})
    return plt


def main() -> list[Path]:
    """All figures there are numbers for."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    drawn = [path for device, rows in files().items() for path in draw(device, rows, FIGURES)]
    return drawn + draw_lengths(results.lengths_record()["rows"], FIGURES)
