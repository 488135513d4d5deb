"""docs/paper.md's tables: our figures, from the files that hold them, beside the paper's (arXiv 2505.24544)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "results" / "paper"
COURSE = {
    "Beagle": (".83 .72 .59 .54 .53", ".90 .81 .73 .68 .67"),
    "EAGLE-2": (".74 .50 .32 .28 .26", ".90 .76 .67 .64 .62"),
}
"""Acceptance at depths 0 to 4 after the first and the tenth epoch, read by eye off figure 3."""
ABLATIONS = {
    "figure4": ("window", "tokens/s", {"1": "93.8", "2": "100.3", "3": "104.0", "4": "101.7", "5": "102.1"}),
    "figure10_steps": ("simulated steps", "tokens/s", {"1": "98.2", "2": "102.2", "3": "104.0", "4": "105.5"}),
    "figure10_stages": (
        "objective",
        "tokens a round",
        {"next token": "3.70", "block": "4.02", "block + simulation": "4.31"},
    ),
    "start": ("start", "tokens a round", {}),
    "append": ("draft states as keys", "tokens/s", {"append": "109.0", "no append": "107.4"}),
}
"""Figure -> what differs, the paper's unit and its values on MT-Bench, of a 7B target's draft after 20 epochs."""


def settings() -> str:
    """What all runs share."""
    path = FOLDER / "settings.json"
    if not path.is_file():
        return "not measured"
    found = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"Target {found['target']}; {found['tokens']:,} training tokens in {found['sequences']:,} sequences of "
        f"`{found['data']}`, {found['held_out_sequences']} held out; {found['epochs']:g} epochs a phase, "
        f"{found['tokens_per_step']:,} tokens a step, learning rate {found['lr']:g} falling to a tenth by a "
        f"cosine, {found['warmup_steps']} steps of warm-up in each phase, regression "
        f"weight {found['regression']:g}, draft vocabulary {found['draft_vocab']:,}. A Beagle draft has a key head "
        f"for every query head and the start of `beagle_sd.training.start`, where a table does not say otherwise. "
        f"Chain of {found['shapes']['chain'][0]}; tree of {found['shapes']['tree'][2]} nodes, "
        f"depth {found['shapes']['tree'][0]}, branch "
        f"{found['shapes']['tree'][1]}."
    )


def course() -> str:
    """Acceptance by depth over training, beside the paper's first and last epoch."""
    lines = ["| head | seed | epochs | tokens seen | acceptance at depths 0 to 4 |", "|---|---|---|---|---|"]
    for row in _rows("figure3"):
        lines.append(
            f"| {row['run']} | {row['seed']} | {row['epoch']} | {int(row['tokens_seen']):,} | {_by_depth(row)} |"
        )
    for head, (first, last) in COURSE.items():
        for epoch, shares in ((1, first), (10, last)):
            lines.append(f"| {head}, the paper's, 7B | | {epoch} | | {shares} |")
    return "\n".join(lines)


def ablation(name: str) -> str:
    """Tokens a round of each run, beside the paper's figure."""
    what, unit, published = ABLATIONS[name]
    lines = [
        f"| {what} | seed | tokens seen | chain | tree | accepted by depth, chain | the paper's {unit} |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = _rows(name)
    for row in measured:
        tokens = " | ".join(
            f"{float(row[shape]):.3f} ± {float(row[f'{shape}_error']):.3f}" for shape in ("chain", "tree")
        )
        lines.append(
            f"| {row['run']} | {row['seed']} | {int(row['tokens_seen']):,} | {tokens} | {_by_depth(row)} | "
            f"{published.get(row['run'], '')} |"
        )
    if not measured:
        lines += [f"| {label} | | | not measured | | | {value} |" for label, value in published.items()]
    return "\n".join(lines)


def _rows(name: str) -> list[dict]:
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _by_depth(row: dict) -> str:
    shares = (row.get(f"depth_{depth}") for depth in range(5))
    return " ".join(f"{float(share):.2f}".lstrip("0") for share in shares if share is not None)


TABLES: dict[str, Callable[[], str]] = {"paper_settings": settings, "paper_figure3": course}
TABLES |= {f"paper_{name}": partial(ablation, name) for name in ABLATIONS}
