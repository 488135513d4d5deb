"""`compact_cache_` by the compiled executors: bytes moved within each row, all layers at once."""

from __future__ import annotations

from torch import Tensor

from ..extension import _C, address, allow, compiled, contiguous, executor, flat


@compiled("compact_cache_")
def compact_cache_(
    cache: Tensor, path: Tensor, num_accepted: Tensor, lengths: Tensor, block_table: Tensor | None = None
) -> None:
    layers, planes, rows, heads, slots, size = cache.shape
    allow("compact_cache_", "the number of rows", len(path), _C.max_rows, cache.device)
    item = cache.element_size()
    kept, (path_at, *counts) = flat(path, num_accepted, lengths)
    block_table = contiguous(block_table)
    strides = tuple(stride * item for stride in cache.stride()[:5])
    with executor(cache.device) as (module, where):
        module.compact_cache(
            where,
            cache.data_ptr(),
            layers,
            planes,
            len(path),
            heads,
            slots,
            size * item,
            *strides,
            rows,
            0 if block_table is None else block_table.shape[1],
            path_at,
            path.shape[1],
            *counts,
            address(block_table),
        )
