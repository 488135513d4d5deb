"""Moving the accepted nodes' keys and values to where plain decoding would have put them.

The target ran over the tree with node i in slot lengths + i. After acceptance slot lengths + i takes slot
lengths + path[i]: one call for all layers, keys and values. A path's indices grow, so path[i] >= i and every slot is
read before it is overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks


def compact_cache_(
    cache: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write slot lengths[b] + path[b, i] of every layer into slot lengths[b] + i, for i = 0..num_accepted[b].

    cache [layers, planes, B, Hkv, S, D], or pages [layers, planes, P, Hkv, page, D] with block_table int32
    [B, max_pages]; planes are 2 for keys and values together, 1 where these are two tensors, or any other number; any
    dtype, moved by bytes; any strides as long as D is contiguous. path int32 [B, L], num_accepted and lengths int32 [B]
    as in a Verdict. Moves that would go up (path[i] < i) or leave the cache or the block table are left
    out. lengths stays as it is. Raises ValueError or TypeError on wrong shapes and dtypes; the "cuda" backend takes B
    up to 65535 (BackendError).
    """
    op = "compact_cache_"
    checks.tensor(op, "path", path, [None, None], [torch.int32])
    batch = len(path)
    if not isinstance(cache, Tensor):
        raise TypeError(f"{op}: cache is a {type(cache).__name__}; allowed: a torch.Tensor")
    rows = batch if block_table is None else None
    checks.tensor(op, "cache", cache, [None, None, rows, None, None, None], [cache.dtype])
    checks.at_least(op, "the number of planes", cache.shape[1], 1)
    if cache.numel() and cache.stride(-1) != 1 and cache.shape[-1] > 1:
        raise ValueError(f"{op}: cache has stride {cache.stride(-1)} in its last dimension; allowed: 1")
    checks.tensor(op, "num_accepted", num_accepted, [batch], [torch.int32])
    checks.tensor(op, "lengths", lengths, [batch], [torch.int32])
    if block_table is not None:
        checks.tensor(op, "block_table", block_table, [batch, None], [torch.int32])
    checks.same_device(op, cache=cache, path=path, num_accepted=num_accepted, lengths=lengths, block_table=block_table)
    torch.ops.beagle.compact_cache_(cache, path, num_accepted, lengths, block_table, backend)


@backends.operator("compact_cache_", mutates_args=("cache",))
def _compact_cache_(
    cache: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    backends.call("compact_cache_", backend, cache.device, cache, path, num_accepted, lengths, block_table)


@_compact_cache_.register_fake
def _(cache, path, num_accepted, lengths, block_table=None, backend="auto"):
    return None
