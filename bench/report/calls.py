"""Tables of the loop: copied branches, guided answers, many prompts over a few rows, chats: docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.report import results

_SETS = ("mt-bench", "humaneval", "gsm8k", "editing")


def lookups() -> str:
    """Tokens a round with a branch copied from the text and without, a row a set and tree."""
    lines = [
        "| prompts | tree | greedy: without, with | | at T = 1: without, with | |",
        "|---|---|---|---|---|---|",
    ]
    for name in _SETS:
        if not (results.RESULTS / f"lookup-{name}.json").exists():
            continue
        rows = results.read(f"lookup-{name}.json")["shapes"]
        for copied in [row for row in rows if row["lookup"] and row["temperature"] == 0.0]:
            sizes = {size: copied[size] for size in ("depth", "branch", "num_nodes")}
            cells = [name, f"{sizes['num_nodes']} nodes, {copied['lookup']} copied"]
            for temperature in (0.0, 1.0):
                alike = [row for row in rows if row["temperature"] == temperature and sizes.items() <= row.items()]
                without, with_it = (row["tokens_per_round"] for row in sorted(alike, key=lambda row: row["lookup"]))
                cells += [f"{without:.2f}, {with_it:.2f}", f"{with_it / without - 1:+.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "not measured"


def guided() -> str:
    """Answers in JSON by schema: a row a library and temperature."""
    if not (results.RESULTS / "guided.json").exists():
        return "not measured"
    rows = results.read("guided.json")["rows"]
    trees = list(rows[0]["guided"])
    head = ["library", "T", "answers", "ended", "valid", "equal"]
    head += [f"tokens a round, {name}: {_tree(tree)}" for name in ("guided", "unguided") for tree in trees]
    lines = []
    for row in rows:
        counts = [str(row[name]) for name in ("answers", "ended", "valid", "equal")]
        told = [f"{row[name][tree]:.2f}" for name in ("guided", "unguided") for tree in trees]
        lines.append([row["library"], f"{row['temperature']:g}", *counts, *told])
    return _table(head, lines)


def _tree(written: str) -> str:
    """A tree as it is written, in words."""
    _, _, nodes, *copied = written.split(",")
    return f"{nodes} nodes" + (f", up to {copied[0]} copied" if copied else "")


def many() -> str:
    """generate_many beside batches that wait for their longest text: a row a way, without and with the draft."""
    if not (results.RESULTS / "many.json").exists():
        return "not measured"
    head = ["tree", "", "texts equal", "tokens", "rounds", "tokens/s"]
    head += ["x as fast is `generate_many`, median (20%, 80%)", "95% lower bound"]
    lines = []
    for row in results.read("many.json")["rows"]:
        way = f"`{row['way']}`" if row["ratio"] is None else f"`generate` {row['way']}"
        counts = [f"{row['equal']} of {row['texts']}", f"{row['tokens']:,}", f"{row['rounds']:,}"]
        speed = f"{row['tokens_per_second']:.1f}"
        lines.append([row["tree"] or "no draft", way, *counts, speed, _spread(row["ratio"]), _bound(row["ratio"])])
    return _table(head, lines)


def chat_turns() -> str:
    """The prefill of a chat's later turns: a row a length of the question, and one of all."""
    if not (results.RESULTS / "chat-turns.json").exists():
        return "not measured"
    head = ["question of about", "turns", "tokens held", "new tokens", "whole prompt, ms", "reused, ms"]
    head += ["new tokens alone, ms", "reused / alone, median (20%, 80%)", "95% upper bound", "time saved, median"]
    lines = []
    for row in results.read("chat-turns.json")["rows"]:
        length = f"{row['length']} tokens" if row["length"] else "all"
        counts = [str(row[name]) for name in ("turns", "held", "new")]
        seconds = [f"{row[f'{way}_ms']:.0f}" for way in ("whole", "reused", "alone")]
        over = [_spread(row["over_alone"]), _bound(row["over_alone"], "at_most")]
        lines.append([length, *counts, *seconds, *over, f"{row['saved']['median']:.0%}"])
    return _table(head, lines)


def _spread(ratio: dict | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})"


def _bound(ratio: dict | None, name: str = "bound") -> str:
    return "" if ratio is None or ratio[name] is None else f"{ratio[name]:.2f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(f"| {' | '.join(c)} |" for c in lines)]
    )


TABLES: dict[str, Callable[[], str]] = {"lookups": lookups, "guided": guided, "many": many, "chat_turns": chat_turns}
"""By the name that the page has."""
