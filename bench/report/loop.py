"""The tables of what the loop does besides: copied branches, guides, many prompts, chats."""

from __future__ import annotations

from collections.abc import Callable

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
    """Answers in JSON by schema, a row a library and temperature."""
    if not (results.RESULTS / "guided.json").exists():
        return "not measured"
    rows = results.read("guided.json")["rows"]
    trees = list(rows[0]["guided"])
    named = " | ".join(f"tokens a round, tree {tree} (unguided)" for tree in trees)
    lines = [
        f"| library | T | answers | ended | valid | as plain guided decoding | {named} |",
        "|---|---|---|---|---|---|" + "---|" * len(trees),
    ]
    for row in rows:
        counts = [str(row[name]) for name in ("answers", "ended", "valid", "equal")]
        told = [f"{row['guided'][tree]:.2f} ({row['unguided'][tree]:.2f})" for tree in trees]
        lines.append("| " + " | ".join([row["library"], f"{row['temperature']:g}", *counts, *told]) + " |")
    return "\n".join(lines)


def many() -> str:
    """generate_many beside batches that wait for their longest text."""
    if not (results.RESULTS / "many.json").exists():
        return "not measured"
    lines = [
        "| drafting | way | texts, equal | tokens a second | forwards | `generate_many` is x as fast (20%, 80%) "
        "| 95% lower bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results.read("many.json")["rows"]:
        ratio = row["ratio"]
        told = f"{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})" if ratio else ""
        bound = "" if not ratio or ratio["bound"] is None else f"{ratio['bound']:.2f}"
        equal, drafting = f"{row['texts']}, {row['equal']}", f"tree {row['tree']}" if row["tree"] else "none"
        cells = drafting, row["way"], equal, f"{row['tokens_per_second']:.0f}", str(row["rounds"]), told, bound
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chat_turns() -> str:
    """The prefill of later turns, by the length of the question."""
    if not (results.RESULTS / "chat-turns.json").exists():
        return "not measured"
    lines = [
        "| question | turns | held, new tokens | reused, ms | whole prompt, ms | new tokens alone, ms "
        "| reused over alone, median (20%, 80%) | of the time saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.read("chat-turns.json")["rows"]:
        over, saved = row["over_alone"], row["saved"]["median"]
        name = "all" if row["length"] is None else f"about {row['length']} tokens"
        times = [f"{row[way]:.0f}" for way in ("reused_ms", "whole_ms", "alone_ms")]
        ratio = f"{over['median']:.2f} ({over['low']:.2f}, {over['high']:.2f})"
        cells = name, str(row["turns"]), f"{row['held']:,}, {row['new']}", *times, ratio, f"{saved:.0%}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"lookups": lookups, "guided": guided, "many": many, "chat_turns": chat_turns}
"""By the name that the pages have."""
