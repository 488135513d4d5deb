"""`block_attention` on the CPU: blocks of rows against the keys that any of them sees, through PyTorch's flash kernel.

A block of rows reads the keys from its first row's reach to its last row's window and no more. So the cost is linear
in the text with a reach and near half of dense without, and the memory linear. Query heads that share a key head are
laid out as [Hkv, G, rows, D], keys as the same with stride 0 over G, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation

BLOCK = 256
"""Query rows a block; with a reach half of it, since a block reads the keys of both."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _blocks(
    rows: int, offset: Tensor, cu_seqlens: Tensor | None, window: int, reach: int | None, dtype: torch.dtype
) -> Iterator:
    """(query rows, key rows, additive mask): whole windows of rows that all see some key, the rest is left out. Where
    the reach is shorter than a window, one window a block, without the rows beyond the reach.

    Which keys a row sees, counted from its block's first row, does not depend on the block: all masks are views of one.
    """
    if reach is None or reach >= rows:
        reach, size = rows, BLOCK
    else:
        size = min(BLOCK, max(reach // 2, 32))
    if reach < window:
        block, used = window, reach
    else:
        block = max(min(size // window, -(-rows // window)), 1) * window
        used = min(block, rows)
    row, key = torch.arange(used)[:, None], torch.arange(-reach, block - window)
    mask = torch.zeros(used, len(key), dtype=dtype)
    mask.masked_fill_((key >= row // window * window) | (key < row - reach), -torch.inf)
    bounds = [0, rows] if cu_seqlens is None else cu_seqlens.clamp(0, rows).tolist()
    for start, stop, begin in zip(bounds[:-1], bounds[1:], offset.tolist(), strict=True):
        # The first window with a key before it; one that starts its sequence has none.
        begin = begin if begin > 0 else begin % window or window
        for first in range(start + begin, stop, block):
            last = min(first + used, stop)
            own = (last - first - 1) // window * window
            reached = min(reach, first - start)
            keys = slice(first - reached, first + own)
            yield slice(first, last), keys, mask[: last - first, reach - reached : reach + own]


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """[rows, H, D] as [Hkv, H / Hkv, rows, D], a view."""
    return x.unflatten(1, (key_heads, x.shape[1] // key_heads)).permute(1, 2, 0, 3)


def _contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """The kernel wants a last dimension of stride 1."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@implementation("block_attention", "cpu")
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _contiguous_rows(q, k, v)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulation(q.dtype))
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for queries, keys, mask in _blocks(q.shape[0], offset, cu_seqlens, window, reach, q.dtype):
        part = [_grouped(x[keys], key_heads).expand(-1, group, -1, -1) for x in (k, v)]
        block, block_lse = _flash(_grouped(q[queries], key_heads), *part, attn_mask=mask, scale=scale)
        _grouped(out[queries], key_heads).copy_(block)
        lse[queries] = block_lse.flatten(0, 1).T
    return out, lse


@implementation("block_attention_backward", "cpu")
def block_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes, acc = (q.dtype, k.dtype, v.dtype), accumulation(q.dtype)
    grad_out, q, k, v, out = _contiguous_rows(*(x.to(acc) for x in (grad_out, q, k, v, out)))
    if grad_lse is not None:
        grad_out, out = _fold_grad_lse(grad_out, grad_lse, out)
    grads = [torch.zeros(x.shape, dtype=acc) for x in (q, k, v)]
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for queries, keys, mask in _blocks(q.shape[0], offset, cu_seqlens, window, reach, acc):
        rows = [_grouped(x[queries], key_heads) for x in (grad_out, q, out)]
        part = [_grouped(x[keys], key_heads).expand(-1, group, -1, -1) for x in (k, v)]
        rows_lse = lse[queries].T.unflatten(0, (key_heads, group))
        args = rows[0], rows[1], *part, rows[2], rows_lse, 0.0, False
        grad_q, grad_k, grad_v = _flash_backward(*args, attn_mask=mask, scale=scale)
        _grouped(grads[0][queries], key_heads).copy_(grad_q)
        grads[1][keys] += grad_k.sum(1).transpose(0, 1)
        grads[2][keys] += grad_v.sum(1).transpose(0, 1)
    return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _fold_grad_lse(grad_out: Tensor, grad_lse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Make the kernel's g . out be g . out - h: it enters nowhere else, so out may be moved along g.

    Where g is 0 it first becomes tiny in one component, too small to show in any gradient.
    """
    norm = grad_out.square().sum(-1, keepdim=True)
    small = norm < 1e-36
    if small.any():
        nudge = torch.zeros_like(grad_out)
        nudge[..., :1] = small * 1e-17
        grad_out = torch.where(small, nudge, grad_out)
        norm = torch.where(small, 1e-34, norm)
    return grad_out, out - grad_lse[..., None] * (grad_out / norm)
