"""block_attention beside FlexAttention under the same mask: `python -m bench flex_attention`.

Each compilation takes FlexAttention some ten seconds, so it has a file of its own that can be stopped and gone on with:
one set of options is one case, with ours measured beside it. All are tried at one number of rows, forward and backward;
the other sizes then have the fastest of the rows that are there, from whichever run they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from bench.ops.bench_block_attention import drawn, heads_first, name_of, of_inputs
from bench.peers import flex
from bench.registry import Case, drive, label, parameters

OF_A_PEER = True
"""Without its peer there is nothing here to measure, and `cases` is given the rows that are there."""
ROWS = {"tiny": (70, 40), "full": (16384, 8192, 32768)}
"""Options are tried at the first."""
SHAPE = {"tiny": (4, 2, 16, torch.float32), "full": (32, 8, 128, torch.bfloat16)}
"""Query heads, key heads, head size, dtype."""
REACH = {"tiny": 20, "full": 256}
TUNED = "flex tuned"


def cases(device: str = "cpu", size: str = "small", known: Sequence[dict] = ()) -> Iterator[Case]:
    """known: rows that are there; those of the first cases must be added to it before the others are asked for."""
    if size not in ROWS:
        return
    first, *others = ROWS[size]
    inputs = drawn_twice(first, size, device)
    for backward, tried in flex.TRIED.items():
        for options in tried:
            yield beside_flex(inputs, backward, options)
    for rows in others:
        inputs = drawn_twice(rows, size, device)
        for backward in flex.TRIED:
            found = fastest(known, name_of(first, *SHAPE[size], backward), backward)
            yield beside_flex(inputs, backward, found, TUNED)
    inputs = drawn_twice(first, size, device)
    for backward in flex.TRIED:
        yield beside_flex(inputs, backward, flex.DEFAULT, reach=REACH[size])


def drawn_twice(rows: int, size: str, device: str) -> list[tuple]:
    hq, hkv, d, dtype = SHAPE[size]
    return [drawn(rows, hq, hkv, d, device, dtype) for _ in range(2)]


def fastest(known: Sequence[dict], name: str, backward: bool) -> str:
    """The options whose row took least time, its default where none has a number."""
    found = {row["options"]: row["p50"] for row in known if _is_trial(row, name) and "p50" in row}
    allowed = {options: seconds for options, seconds in found.items() if options in flex.TRIED[backward]}
    return min(allowed, key=lambda options: allowed[options]) if allowed else flex.DEFAULT


def _is_trial(row: dict, name: str) -> bool:
    return row["peer"] == "flex" and row["group"].startswith(f"{name}, beside FlexAttention")


def beside_flex(
    inputs: list[tuple], backward: bool, options: str, peer: str = "flex", reach: int | None = None
) -> Case:
    """With options of flex.TRIED by name: they stand in the row, and in the case's name where they are tried."""
    device = inputs[0][0].device.type
    with_mask = options == flex.DEFAULT and peer == "flex" and not backward
    attend = flex.attention(flex.TRIED[backward][options] if device == "cuda" else None)

    def others(limits: tuple) -> dict[str, Callable | str]:
        if backward and (why := flex.why_not(device)):
            return {peer: why}
        first, end = limits
        rows, first = len(end), first if first.any() else None
        mask = flex.block_mask(end, rows, first)
        found: dict[str, Callable | str] = {
            peer: lambda q, k, v: attend(*heads_first(q, k, v), mask)[0].transpose(0, 1)
        }
        return found | ({"flex, its mask made": lambda q, k, v: flex.block_mask(end, rows, first)} if with_mask else {})

    tried = "FlexAttention" + (f" ({options})" if peer == "flex" else "")
    case = of_inputs(inputs, backward, reach, others, beside=tried)
    return replace(case, notes=lambda name: {"options": options} if name == peer else {})


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_flex_attention(benchmark, case, peer):
    drive(benchmark, case, peer)
