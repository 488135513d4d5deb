"""What a GPU's run is asked for, and whether it gave it: `python -m bench.report --bars FILE`, as plain text.

FILE is what `bench/gpu/check.sh` writes, or the rows of `python -m bench --json`. The bars stand in BARS and nowhere
else. Every ratio is of one case, and so of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Figure = Callable[["Found"], "tuple[float, str] | None"]
"""A figure and a remark about it, None where a row that it needs is missing."""


class Found:
    """The rows of a record by group, each group's of one run: of several the fuller one, else the last."""

    def __init__(self, record: dict | list[dict]):
        steps = [{"rows": record}] if isinstance(record, list) else record["steps"].values()
        self.limits: dict[str, float] = {} if isinstance(record, list) else record.get("limits") or {}
        self.groups: dict[str, list[dict]] = {}
        for step in steps:
            of_step: dict[str, list[dict]] = {}
            for row in step.get("rows", []):
                of_step.setdefault(row["group"], []).append(row)
            for group, rows in of_step.items():
                if _numbers(rows) >= _numbers(self.groups.get(group, [])):
                    self.groups[group] = rows

    def matching(self, start: str, **at) -> Iterator[tuple[str, dict[str, dict]]]:
        """(name, rows with a number by peer) of the groups that begin so and are of these sizes."""
        for group, rows in self.groups.items():
            sizes = rows[0].get("at", {})
            if group.startswith(start) and all(sizes.get(name) == size for name, size in at.items()):
                yield group, {row["peer"]: row for row in rows if "p50" in row}

    def row(self, start: str, peer: str = "beagle", **at) -> dict:
        """A peer's row of the first such group that is beside no other package alone, {} where there is none."""
        for group, rows in self.matching(start, **at):
            if "beside" not in group and peer in rows:
                return rows[peer]
        return {}


def _numbers(rows: list[dict]) -> int:
    return sum("p50" in row for row in rows)


class Bar(NamedTuple):
    """least or most: the bar, None of both where a figure is asked for and no bar is known here."""

    what: str
    figure: Figure
    least: float | None = None
    most: float | None = None
    percent: bool = False


def teraflops(start: str, **at) -> Figure:
    def figure(found: Found):
        row = found.row(start, **at)
        return (row["flop/s"] / 1e12, row.get("clock", "")) if "flop/s" in row else None

    return figure


def share_of_copy(start: str, **at) -> Figure:
    """Bytes a second of those that the GPU's copy moves in the same run."""

    def figure(found: Found):
        row = found.row(start, **at)
        if "share of copy" in row:
            return row["share of copy"], row.get("clock", "")
        limit = found.limits.get("byte/s")
        return (row["byte/s"] / limit, row.get("clock", "")) if limit and "byte/s" in row else None

    return figure


def times(start: str, over: str, under: str, **at) -> Figure:
    """Seconds of one peer over another's."""

    def figure(found: Found):
        for _, rows in found.matching(start, **at):
            if over in rows and under in rows:
                return rows[over]["p50"] / rows[under]["p50"], ""
        return None

    return figure


def times_flex(start: str, **at) -> Figure:
    """Over FlexAttention with the fastest of the options tried, ours measured beside it."""

    def figure(found: Found):
        beside = []
        for group, rows in found.matching(start, **at):
            peer = next((row for name, row in rows.items() if name in ("flex", "flex tuned")), None)
            if "FlexAttention" in group and peer and "beagle" in rows:
                beside.append((peer["p50"], peer["p50"] / rows["beagle"]["p50"], peer.get("options", "")))
        if not beside:
            return None
        _, ratio, options = min(beside)
        return ratio, options + (f", best of {len(beside)}" if len(beside) > 1 else "")

    return figure


def noted(name: str, start: str, **at) -> Figure:
    """What a row of ours says beside its seconds."""

    def figure(found: Found):
        row = found.row(start, **at)
        return (row[name], f"{row['round_ms']:.2f} ms a round") if name in row else None

    return figure


ROWS = (8192, 16384, 32768)
HEADS = "32/8 x 128"
TREE = {"batch": 8, "keys": 32768, "heads": HEADS}
LOGITS = {"batch": 8, "nodes": 64, "vocabulary": 128256, "type": "bfloat16"}
LOSSES = ({"rows": 8192, "width": 4096}, {"rows": 4096, "width": 2048})
ROUND = {"model": "8B random bfloat16", "batch": 1}


def _block_attention(direction: str, least: float) -> Iterator[Bar]:
    start = f"block_attention {direction}"
    for rows in ROWS:
        at = {"rows": rows, "heads": HEADS, "reach": None}
        yield Bar(f"{start}, {rows} rows, TFLOP/s", teraflops(start, **at), least)
        yield Bar(f"{start}, {rows} rows, x tuned FlexAttention", times_flex(start, **at), 1.2)


BARS: tuple[Bar, ...] = (
    *_block_attention("forward", 450),
    *_block_attention("backward", 300),
    Bar(
        "tree_attention, 16 nodes, 32k keys, of copy",
        share_of_copy("tree_attention", nodes=16, **TREE),
        0.8,
        None,
        True,
    ),
    Bar("tree_attention, 64 nodes, 32k keys, TFLOP/s", teraflops("tree_attention", nodes=64, **TREE), 350),
    *(
        Bar(f"verify_tree {mode}, of copy", share_of_copy(f"verify_tree {mode}", **LOGITS), least, percent=True)
        for mode, least in (("greedy", 0.8), ("sampled", 0.6), ("top-p", 0.4))
    ),
    *(
        Bar(
            f"distill_loss, {at['rows']} x {at['width']}, its products' time over ours",
            times("distill_loss", "its products alone", "beagle", type="bfloat16", **at),
            0.85,
            percent=True,
        )
        for at in LOSSES
    ),
    Bar(
        "training step, stage 2 over stage 1",
        times("training step, k", "beagle", "stage 1", products="bf16"),
        most=1.25,
    ),
    Bar(
        "round, all but the target's forward",
        noted("share_beside_target", "decode round", **ROUND),
        most=0.22,
        percent=True,
    ),
    Bar("round, all but its layers", noted("share_beside_layers", "decode round", **ROUND), percent=True),
    Bar("round, x plain decoding in the same loop", times("decode round", "beagle plain", "beagle", **ROUND), 2.8),
    Bar("round, x target.generate", times("decode round", "target.generate", "beagle", **ROUND)),
)


def lines(record: dict | list[dict], bars: Sequence[Bar] = BARS) -> list[str]:
    """A line a bar: the figure, the bar, and whether it is met; before them what was refused its numbers."""
    found = Found(record)
    width = max(len(bar.what) for bar in bars)
    errors = [(group, row["error"]) for group, rows in found.groups.items() for row in rows if "error" in row]
    refused = [f"refused: {group}: {' '.join(error.split())[:200]}" for group, error in errors]
    return refused + [f"{bar.what:{width}}  {_said(bar, bar.figure(found))}".rstrip() for bar in bars]


def _said(bar: Bar, figure: tuple[float, str] | None) -> str:
    asked = "no bar"
    if bar.least is not None or bar.most is not None:
        word, limit = ("at least", bar.least) if bar.least is not None else ("at most", bar.most)
        asked = f"{word} {_written(limit, bar)}"
    if figure is None:
        return f"{'not measured':>12}  {asked:16}"
    value, remark = figure
    verdict = ""
    if asked != "no bar":
        met = (bar.least is None or value >= bar.least) and (bar.most is None or value <= bar.most)
        verdict = "met" if met else "NOT MET"
    return f"{_written(value, bar):>12}  {asked:16}  {verdict:7}  {remark}"


def _written(value: float | None, bar: Bar) -> str:
    assert value is not None
    return f"{value:.1%}" if bar.percent else f"{value:.1f}" if "TFLOP" in bar.what else f"{value:.3f}"
