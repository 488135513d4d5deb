"""docs/targets.md: which kinds of models work as targets, as bench.answers.targets found it."""

from __future__ import annotations

import re
from collections.abc import Callable

from bench.report import results

LONGEST = 180
"""Characters of an error that are shown."""


def _rows(*outcomes: str) -> list[dict]:
    return [row for row in results.read("targets.json")["rows"] if row["outcome"] in outcomes]


def _name(row: dict) -> str:
    return row["kind"] + (" *" if row["layers"] == "full attention" else "")


def run() -> str:
    """What was tried, and on what."""
    found = results.read("targets.json")
    kinds = len({row["kind"] for row in found["rows"]})
    return f"transformers {found['transformers']} with torch {found['torch']}: {kinds} kinds"


def working() -> str:
    """The kinds whose own tokens came, as they come and with full attention."""
    lines = []
    for layers, title in (("as it comes", "As they come"), ("full attention", "With full attention in every layer")):
        names = sorted(row["kind"] for row in _rows("same") if row["layers"] == layers)
        lines.append(f"{title} ({len(names)}): {', '.join(names)}.")
    return "\n\n".join(lines)


def reason(why: str) -> str:
    """A refusal without what is particular to one model: its name, and sizes that the tiny model has."""
    text = re.sub(r"^(?!the |layer )\S+ ", "", why.partition("; allowed")[0])
    text = re.sub(r" \(they differ by [^)]*\)|=\d[\d.]*", "", text)
    return _short(text)


def _short(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."


def refused() -> str:
    """The kinds by the reason why they were refused, most kinds first."""
    by_reason: dict[str, list[str]] = {}
    for row in _rows("refused"):
        by_reason.setdefault(reason(row["why"]), []).append(_name(row))
    lines = ["| reason: the model ... | kinds |", "|---|---|"]
    for why, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {why} | {', '.join(sorted(names))} |")
    return "\n".join(lines)


def faults() -> str:
    """The kinds with tokens that were not their own, or with errors that are no refusals."""
    lines = [f"| {_name(row)} | {row['outcome']}: {_short(row['why'])} |" for row in _rows("other tokens", "raised")]
    return "\n".join(["| kind | what happened |", "|---|---|", *lines]) if lines else "None."


def not_made() -> str:
    """The kinds of which no tiny model could be made, or whose own generate fails."""
    lines = []
    for row in _rows("not made"):
        why = re.sub(r"^Strict\w+: .*?: (?=\w+Error: )", "", row["why"])  # a config's own check of its fields
        lines.append(f"| {_name(row)} | {_short(why)} |")
    return "\n".join(["| kind | why |", "|---|---|", *lines])


TABLES: dict[str, Callable[[], str]] = {
    "targets_run": run,
    "targets_working": working,
    "targets_refused": refused,
    "targets_faults": faults,
    "targets_not_made": not_made,
}
