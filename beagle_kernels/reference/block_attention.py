"""The definition of `block_attention` and of its gradient: dense scores under a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation


def visible_keys(
    rows: int, window: int, offset: Tensor, cu_seqlens: Tensor | None, reach: int | None = None
) -> tuple[Tensor, Tensor]:
    """The half-open range of keys each row sees: (first, end), int64 [T] each; first = end where it sees none."""
    row = torch.arange(rows, device=offset.device)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, rows], device=offset.device)
    if offset.numel() == 0:
        return torch.zeros_like(row), torch.zeros_like(row)
    cu_seqlens = cu_seqlens.long().clamp(0, rows)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    inside = (sequence < offset.numel()) & (row >= cu_seqlens[0])
    sequence = sequence.clamp(max=offset.numel() - 1)
    first = cu_seqlens[sequence]
    since = row - first - offset.long()[sequence]
    end = torch.where(inside & (since >= 0), row - since % window, first)
    if reach is not None:
        first = first.maximum(row - reach)
    return first, end.maximum(first)


def _scores(
    q: Tensor, k: Tensor, offset: Tensor, cu_seqlens: Tensor | None, window: int, scale: float, reach: int | None
):
    """Masked scores [Hkv, G, T, T] and the grouped queries [T, Hkv, G, D], both in the accumulation dtype."""
    rows, heads, width = q.shape
    first, end = visible_keys(rows, window, offset, cu_seqlens, reach)
    key = torch.arange(rows, device=q.device)
    mask = (key >= first[:, None]) & (key < end[:, None])
    grouped = q.reshape(rows, k.shape[1], heads // max(k.shape[1], 1), width)
    scores = torch.einsum("ihgd,jhd->hgij", grouped, k) * scale
    return scores.masked_fill(~mask, float("-inf")), grouped


@implementation("block_attention", "reference")
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
    dtype, (q, k, v) = q.dtype, (x.to(accumulation(x.dtype)) for x in (q, k, v))
    scores, grouped = _scores(q, k, offset, cu_seqlens, window, scale, reach)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("hgij,jhd->ihgd", weights, v)
    return out.reshape(q.shape).to(dtype), lse.permute(2, 0, 1).reshape(q.shape[:2]).contiguous()


@implementation("block_attention_backward", "reference")
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
    """With P the weights and g, h the gradients of out and lse: dV = P'g, dS = P (g V' - g . out + h), row by row."""
    dtypes = q.dtype, k.dtype, v.dtype
    grad_out, q, k, v, out = (x.to(accumulation(x.dtype)) for x in (grad_out, q, k, v, out))
    scores, grouped = _scores(q, k, offset, cu_seqlens, window, scale, reach)
    per_group = grouped.shape[:3]
    pivot = lse.masked_fill(lse == float("-inf"), 0.0).view(per_group).permute(1, 2, 0)
    weights = torch.exp(scores - pivot[..., None])
    shift = (grad_out * out).sum(-1) if grad_lse is None else (grad_out * out).sum(-1) - grad_lse
    grad_out = grad_out.reshape(grouped.shape)
    grad_scores = torch.einsum("ihgd,jhd->hgij", grad_out, v) - shift.view(per_group).permute(1, 2, 0)[..., None]
    grad_scores = weights * grad_scores * scale
    grads = (
        torch.einsum("hgij,jhd->ihgd", grad_scores, k).reshape(q.shape),
        torch.einsum("hgij,ihgd->jhd", grad_scores, grouped),
        torch.einsum("hgij,ihgd->jhd", weights, grad_out),
    )
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes, strict=True))
