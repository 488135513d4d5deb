"""Which program of block attention's grid takes which tile, and how evenly the work falls on a GPU."""

from __future__ import annotations

import heapq

import pytest
import torch

pytest.importorskip("triton")

from beagle_kernels.triton import tiles  # noqa: E402

PROCESSORS = tiles.ON_HOST.multi_processor_count
HQ, HKV, D = 32, 8, 128


@pytest.mark.parametrize("blocks, heads, together", [(1, 1, 1), (7, 9, 3), (64, 32, 32), (5, 8, 3), (256, 32, 4)])
def test_every_tile_is_taken_once(blocks, heads, together):
    taken = [tiles.block_and_head.fn(i, blocks, heads, together) for i in range(blocks * heads)]
    assert sorted(taken) == [(block, head) for block in range(blocks) for head in range(heads)]
    for block, head in taken:
        assert 0 <= block < blocks and 0 <= head < heads
    groups = [head // together for _, head in taken]
    assert groups == sorted(groups), "a group's heads follow each other"


def ideal_share(rows: int, block: int, heads: int, work) -> float:
    """The least time that the grid's work can take over what it takes where each program goes to the first processor
    that is free; work(block) in tiles."""
    streamed = tuple(torch.empty(rows, HQ if heads == HKV else HKV, D, dtype=torch.bfloat16) for _ in range(2))
    blocks = -(-rows // block)
    together = tiles.heads_together(blocks, heads, HKV, streamed)
    order = [work(tiles.block_and_head.fn(i, blocks, heads, together)[0]) for i in range(blocks * heads)]
    free = [0.0] * PROCESSORS
    for time in order:
        heapq.heapreplace(free, free[0] + time)
    return max(sum(order) / PROCESSORS, max(order)) / max(free)


@pytest.mark.parametrize("rows", [2048, 8192, 32768])
def test_the_grid_ends_at_about_one_time(rows):
    """Long rows first over all heads of a group: 0.95 and 0.82 of ideal at 8,192 rows where heads came one by one."""
    forward = ideal_share(rows, 128, HQ, lambda block: 2 + (rows - 128 * block) / 64)
    of_keys = ideal_share(rows, 128, HKV, lambda block: 2 + HQ // HKV * (rows - 128 * block) / 32)
    assert forward > 0.96 and of_keys > 0.96, (forward, of_keys)


def test_long_texts_take_heads_in_groups_that_the_l2_holds():
    def together(rows: int) -> int:
        streamed = tuple(torch.empty(rows, HKV, D, dtype=torch.bfloat16) for _ in range(2))
        return tiles.heads_together(-(-rows // 128), HQ, HKV, streamed)

    assert together(2048) == HQ
    found = together(65536)
    assert found < HQ and found % (HQ // HKV) == 0, "the query heads of a key head stay together"
