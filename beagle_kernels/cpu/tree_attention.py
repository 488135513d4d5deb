"""`tree_attention` on the CPU: the extension's, which reads each key once for all nodes and heads that share it.

Large trees in 16 bits, float64, and a checkout where the extension is not built, go row by row through PyTorch's flash
kernel; where that cannot serve, since it knows neither soft caps nor values of another width than keys, through the
extension or the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..extension import DTYPES, address, contiguous, dense, executor, missing_cpu
from ..reference.tree_attention import gather_pages
from ..reference.tree_attention import tree_attention as definition

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

LARGE = 96
"""Nodes times query heads a key head from which 16-bit matrix products pay (48 and 180 measured, 300 to 1,000 keys);
in fp32 the extension was the faster up to 768."""


@implementation("tree_attention", "cpu")
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    few = q.dtype == torch.float32 or q.shape[1] * q.shape[2] < LARGE * k.shape[1]
    ours = few or softcap is not None or v.shape[3] != k.shape[3]
    if ours and q.dtype in DTYPES and missing_cpu(q.device) is None:
        return _compiled(q, k, v, lengths, mask, block_table, scale, starts, sinks, softcap)
    if softcap is not None or v.shape[3] != k.shape[3]:
        return definition(q, k, v, lengths, mask, block_table, scale, starts, sinks, softcap)
    return _by_rows(q, k, v, lengths, mask, block_table, scale, starts, sinks)


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    q, k, v, lengths, mask = dense(q), dense(k), dense(v), lengths.contiguous(), mask.contiguous()
    block_table, starts, sinks = contiguous(block_table), contiguous(starts), contiguous(sinks)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    if out.numel() == 0:
        return out
    sizes = *q.shape[:3], k.shape[1], q.shape[3], v.shape[3], k.shape[2], mask.shape[2]
    table_width = 0 if block_table is None else block_table.shape[1]
    with executor(q.device) as (module, threads):
        module.tree_attention(
            threads,
            *(x.data_ptr() for x in (q, k, v, out)),
            DTYPES[q.dtype],
            *sizes,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            lengths.data_ptr(),
            mask.data_ptr(),
            address(block_table),
            table_width,
            k.shape[0],
            scale,
            address(starts),
            address(sinks),
            softcap or 0.0,
        )
    return out


def _by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype)
    key_heads, group = k.shape[1], q.shape[2] // k.shape[1]
    bits = (mask[..., None] >> torch.arange(64) & 1).bool().flatten(2)
    bias = torch.zeros(bits.shape, dtype=q.dtype).masked_fill_(~bits, -torch.inf)
    seen = bits.any(1)
    total = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    for row, (length, tail) in enumerate(zip(lengths.tolist(), seen.tolist(), strict=True)):
        length = min(max(length, 0), total)
        used = max((j + 1 for j, one in enumerate(tail[: total - length]) if one), default=0)
        first = 0 if starts is None or not q.shape[1] else max(int(starts[row].min()), 0)
        if not q.shape[1] or length + used <= first:
            continue
        rows_bias = torch.zeros(q.shape[1], length + used, dtype=q.dtype)
        rows_bias[:, length:] = bias[row, :, :used]
        if starts is not None:
            rows_bias.masked_fill_(torch.arange(length + used) < starts[row][:, None], -torch.inf)
        rows_bias = rows_bias[:, first:]
        keys, values = _slots(k, v, row, first, length + used, block_table)
        if starts is not None or not all(tail[:used]):
            hole = (rows_bias < 0).all(0)[:, None]
            keys, values = keys.masked_fill(hole, 0.0), values.masked_fill(hole, 0.0)
        # Query heads as [Hkv, G, N, D], keys as the same with stride 0 over G: nothing is copied.
        queries = q[row].unflatten(1, (key_heads, group)).permute(1, 2, 0, 3)
        keys, values = (x[:, None].expand(-1, group, -1, -1) for x in (keys, values))
        part, lse = _flash(queries, keys, values, attn_mask=rows_bias, scale=scale)[:2]
        if sinks is not None:
            share = torch.sigmoid(lse - sinks.view(key_heads, group, 1))
            part = part * share.masked_fill((rows_bias < 0).all(1), 0.0)[..., None]
        out[row].unflatten(1, (key_heads, group)).copy_(part.permute(2, 0, 1, 3))
    return out


def _slots(k: Tensor, v: Tensor, row: int, first: int, end: int, block_table: Tensor | None) -> list[Tensor]:
    """The row's slots first .. end - 1, [Hkv, end - first, D] each."""
    if block_table is None:
        parts = [x[row, :, first:end] for x in (k, v)]
    else:
        page = k.shape[2]
        table, skipped = block_table[row : row + 1, first // page : -(-end // page)], first // page * page
        parts = [gather_pages(x, table)[0, :, first - skipped : end - skipped] for x in (k, v)]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in parts]
