"""docs/targets.md: which kinds of models work as targets, as bench.answers.targets found it."""

from __future__ import annotations

import re
from collections.abc import Callable

from bench.report import results

LONGEST = 180
"""Characters of an error that are shown."""
FAULTS = ("other tokens", "raised", "took a tree")
TITLES = {
    "as it comes": "it comes",
    "full attention": "changed to full attention in every layer",
    "with an image": "it comes, with an image",
}
MARKS = {"as it comes": "", "full attention": " \\*", "with an image": " (image)"}


def _rows(*outcomes: str) -> list[dict]:
    """Those with such an outcome; before chains there were trees alone."""
    rows = [{"verified": "tree", "chain": ""} | row for row in results.read("targets.json")["rows"]]
    return [row for row in rows if row["outcome"] in outcomes]


def _name(row: dict) -> str:
    return row["kind"] + MARKS[row["layers"]]


def run() -> str:
    """What was tried, and on what."""
    found = results.read("targets.json")
    kinds = len({row["kind"] for row in found["rows"]})
    return f"transformers {found['transformers']} with torch {found['torch']}: {kinds} kinds"


def working() -> str:
    """The kinds whose own tokens came: as they come, with full attention where only that does it, with an image."""
    as_they_come = {row["kind"]: row["verified"] for row in _rows("same") if row["layers"] == "as it comes"}
    lines = ["| as | verified by | kinds | which |", "|---|---|---|---|"]
    for layers, title in TITLES.items():
        for verified in ("tree", "chain"):
            found = {row["kind"] for row in _rows("same") if (row["layers"], row["verified"]) == (layers, verified)}
            if layers == "full attention":
                found -= {kind for kind, by in as_they_come.items() if by in ("tree", verified)}
            if found:
                lines.append(f"| {title} | {verified} | {len(found)} | {', '.join(sorted(found))} |")
    return "\n".join(lines)


def chains() -> str:
    """The kinds whose drafts are chains by the target's reason, most kinds first."""
    return _by_reason([(row["chain"], row) for row in _rows("same") if row["verified"] == "chain"], "reason")


def text_alone() -> str:
    """The kinds that take images and were given none."""
    rows = results.read("targets.json")["rows"]
    if not any(row["layers"] == "with an image" for row in rows):
        return "all of them"
    made = {row["kind"] for row in rows if row["layers"] == "as it comes" and row["outcome"] != "not made"}
    names = [row["kind"] for row in _rows("not made") if row["layers"] == "with an image" and row["kind"] in made]
    return ", ".join(sorted(names)) or "none"


def _by_reason(found: list[tuple[str, dict]], title: str) -> str:
    by_reason: dict[str, list[str]] = {}
    for why, row in found:
        by_reason.setdefault(reason(why), []).append(_name(row))
    lines = [f"| {title} | kinds |", "|---|---|"]
    for why, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {why} | {', '.join(sorted(names))} |")
    return "\n".join(lines) if found else "None."


def reason(why: str) -> str:
    """A refusal without what is particular to one model: its name, and sizes that the tiny model has."""
    text = re.sub(r"^(?!the |layer )\S+ ", "", why.partition("; allowed")[0])
    text = re.sub(r"^the logits of \S+ are", "the logits are", text)
    text = re.sub(r" \(they differ by [^)]*\)| \(layer \d+\)| in layer \d+|=\d[\d.]*", "", text)
    return _short(text)


def _short(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."


def refused() -> str:
    """The kinds by the reason why they were refused, most kinds first."""
    return _by_reason([(row["why"], row) for row in _rows("refused")], "reason: the model ...")


def faults() -> str:
    """The kinds with tokens that were not their own, or with errors that are no refusals."""
    lines = [f"| {_name(row)} | {row['outcome']}: {_short(row['why'])} |" for row in _rows(*FAULTS)]
    return "\n".join(["| kind | what happened |", "|---|---|", *lines]) if lines else "None."


def not_made() -> str:
    """The kinds of which no tiny model could be made, or whose own generate fails."""
    lines = []
    for row in _rows("not made"):
        if row["layers"] == "with an image":
            continue
        why = re.sub(r"^Strict\w+: .*?: (?=\w+Error: )", "", row["why"])  # a config's own check of its fields
        lines.append(f"| {_name(row)} | {_short(why)} |")
    return "\n".join(["| kind | why |", "|---|---|", *lines])


TABLES: dict[str, Callable[[], str]] = {
    "targets_run": run,
    "targets_working": working,
    "targets_chains": chains,
    "targets_text_alone": text_alone,
    "targets_refused": refused,
    "targets_faults": faults,
    "targets_not_made": not_made,
}
