"""A benchmark's rows as a few short lines: what a command on a lent machine shows is its last 12,000 characters."""

from __future__ import annotations

import os

WIDEST = 150


def lines(rows: list[dict]) -> list[str]:
    """A line a case: ours, its shares of the machine's limits, and how many times faster it is than each other; bounds
    stand in brackets."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    first = os.path.commonprefix([f"{group} " for group in groups]).rpartition(" ")[0] if len(groups) > 1 else ""
    return [_line(group.removeprefix(first).strip(" ,"), found)[:WIDEST] for group, found in groups.items()]


def _line(group: str, rows: list[dict]) -> str:
    name = f"  {group.replace('bfloat16', 'bf16')}:"
    if wrong := next((row for row in rows if "error" in row), None):
        return f"{name} refused: {' '.join(wrong['error'].split())}"
    ours = next((row for row in rows if row["peer"] == "beagle" and "p50" in row), None)
    if ours is None:
        return f"{name} no number"
    parts = [f"{ours['p50'] * 1e6:,.1f} us"]
    parts += [
        f"{ours[share]:.0%} {share.split()[-1]}" for share in ("share of copy", "share of matmul") if share in ours
    ]
    if "round_ms" in ours:
        parts.append(f"{ours['round_ms']:.2f} ms a round of {ours['tokens_per_round']:.2f}")
    if "share_beside_target" in ours:
        parts.append(f"{ours['share_beside_target']:.0%} not the target's")
    if "tiles" in ours:
        parts.append(ours["tiles"])
    others = [row for row in rows if row is not ours and "p50" in row]
    parts += [_ratio(row, ours) for row in sorted(others, key=lambda row: row["p50"])]
    return f"{name} {', '.join(parts)}"


def _ratio(row: dict, ours: dict) -> str:
    told = f"{row['peer'].removeprefix('beagle ')} {row['p50'] / ours['p50']:.2f}x"
    return f"[{told}]" if row.get("bound") else told
