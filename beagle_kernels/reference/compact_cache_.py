"""Gather all moved slots, then scatter them: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation


@implementation("compact_cache_", "reference")
def compact_cache_(
    cache: Tensor, path: Tensor, num_accepted: Tensor, lengths: Tensor, block_table: Tensor | None = None
) -> None:
    step = torch.arange(path.shape[1], device=path.device)
    source, target = lengths[:, None] + path.long(), lengths[:, None] + step
    size = cache.shape[4]
    slots = size if block_table is None else size * block_table.shape[1]
    moves = (step <= num_accepted[:, None]) & (path > step) & (lengths[:, None] >= 0)
    moves &= (source < slots) & (target < slots)
    row, column = moves.nonzero(as_tuple=True)
    source, target = source[row, column], target[row, column]
    if block_table is None:
        cache[:, :, row, :, target] = cache[:, :, row, :, source]
        return
    block_table = block_table.long()
    from_page, to_page = block_table[row, source // size], block_table[row, target // size]
    real = (from_page.clamp(0, cache.shape[2] - 1) == from_page) & (to_page.clamp(0, cache.shape[2] - 1) == to_page)
    from_page, to_page, source, target = from_page[real], to_page[real], source[real] % size, target[real] % size
    cache[:, :, to_page, :, target] = cache[:, :, from_page, :, source]
