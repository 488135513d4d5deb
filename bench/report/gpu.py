"""The table of whole rounds on a GPU: what of a round is the target's own, and what the draft brings."""

from __future__ import annotations

from collections.abc import Callable

from bench.report import results


def rounds() -> str:
    """A row a batch: a round's milliseconds, the target's part of them, the share of the rest, and speedups."""
    lines = [
        "| target | tokens a round | round, ms | target's layers, ms | its head, ms | all but its forward "
        "| all but its layers | x plain decoding in the same loop | x `target.generate` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in results.grouped(results.gpu_record()["steps"].get("round", {}).get("rows", [])).items():
        if any("error" in row for row in members):
            lines.append(f"| {group} | refused |  |  |  |  |  |  |  |")
            continue
        by = {row["peer"]: row for row in members}
        ours = by["beagle"]
        cells = [f"{ours['at']['model']}, batch {ours['at']['batch']}", _number(ours, "tokens_per_round", ".2f")]
        cells += [_number(ours, name, ".2f") for name in ("round_ms", "target_layers_ms", "target_head_ms")]
        cells += [_number(ours, name, ".1%") for name in ("share_beside_target", "share_beside_layers")]
        for peer in ("beagle plain", "target.generate"):
            cells.append(f"{by[peer]['p50'] / ours['p50']:.2f}" if peer in by else "not measured")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines if len(lines) > 2 else [*lines, "| an 8B-shaped one | not measured |  |  |  |  |  |  |  |"])


def _number(row: dict, name: str, style: str) -> str:
    return f"{row[name]:{style}}" if name in row else "not measured"


TABLES: dict[str, Callable[[], str]] = {"gpu_rounds": rounds}
"""By the name that the page has."""
