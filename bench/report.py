"""Writes the measured tables of the README, of docs/performance.md and of the bundled draft's card from the files
that hold the numbers: python -m bench.report

A table stands between `<!-- NAME -->` and `<!-- end -->`; `--check` changes nothing and fails where one is stale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from bench.paper.tables import TABLES as PAPER

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BUNDLED = ROOT / "python" / "beagle_sd" / "bundled" / "smollm2-135m"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "paper.md", BUNDLED / "README.md")


def acceptance() -> str:
    """Tokens a round of the bundled draft, greedy beside T = 1."""
    measured = json.loads((BUNDLED / "acceptance.json").read_text(encoding="utf-8"))
    found = {(row["num_nodes"], row["depth"], row["branch"], row["temperature"]): row for row in measured["shapes"]}
    lines = ["| tree | tokens a round, greedy | at T = 1 | accepted by depth, greedy |", "|---|---|---|---|"]
    for nodes, depth, branch in sorted({key[:3] for key in found}):
        greedy, sampled = found.get((nodes, depth, branch, 0.0)), found.get((nodes, depth, branch, 1.0))
        name = f"chain of {depth}" if branch == 1 else f"{nodes} nodes (depth {depth}, branch {branch})"
        by_depth = " ".join(f"{share:.2f}" for share in greedy["acceptance_by_depth"]) if greedy else ""
        lines.append(f"| {name} | {_tokens(greedy)} | {_tokens(sampled)} | {by_depth} |")
    return "\n".join(lines)


def _tokens(row: dict | None) -> str:
    return "not measured" if row is None else f"{row['tokens_per_round']:.2f}"


def speed() -> str:
    """Seconds of whole answers on the CPU, every contender over target.generate in the same dtype."""
    lines = ["| dtype | contender | ms a token | tokens a round | x `target.generate`, median (20%, 80%) |",
             "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("cpu-speed*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        for row in measured["rows"]:
            low, middle, high = row["speedup_20_50_80"]
            tokens = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
            lines.append(f"| {measured['dtype']} | {row['contender']} | {row['ms_per_token']:.1f} | {tokens} | "
                         f"{middle:.2f} ({low:.2f}, {high:.2f}) |")
    return "\n".join(lines)


def lossless() -> str:
    """Tokens compared with the truth, ties of two logits within 1e-3, and faults."""
    lines = ["| sampling | tree | batch | tokens compared | ties | faults |", "|---|---|---|---|---|---|"]
    for row in json.loads((RESULTS / "lossless.json").read_text(encoding="utf-8")):
        cells = (row["sampling"], row["shape"], row["batch"], f"{row['tokens']:,}", row["ties"], row["faults"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ops() -> str:
    """Every op on the CPU beside its fastest peer: medians, and how many times ours is faster."""
    lines = ["| op and shape | ours, µs | fastest peer | its µs | ratio | bound, µs |", "|---|---|---|---|---|---|"]
    groups: dict[str, list[dict]] = {}
    for row in json.loads((RESULTS / "cpu-ops.json").read_text(encoding="utf-8")):
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        if any("error" in row for row in rows):
            lines.append(f"| {group} | refused |  |  |  |  |")
            continue
        peers = {row["peer"]: row["p50"] * 1e6 for row in rows if not row.get("bound")}
        bound = "".join(f"{row['peer']} {row['p50'] * 1e6:,.0f}" for row in rows if row.get("bound"))
        ours = peers.pop("beagle")
        peer, time = min(peers.items(), key=lambda item: item[1])
        lines.append(f"| {group} | {ours:,.0f} | {peer} | {time:,.0f} | {time / ours:.2f}x | {bound} |")
    return "\n".join(lines)


TABLES = {"acceptance": acceptance, "speed": speed, "lossless": lossless, "ops": ops, **PAPER}


def filled(page: str) -> str:
    """The page with every table between its marks made anew."""
    def table(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"<!-- {match[1]} --> names no table; allowed: {', '.join(TABLES)}")
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """1 if --check finds a stale table."""
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if '--check' in arguments else 'written'}: {name}" for name in stale) or "up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
