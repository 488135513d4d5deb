"""`extend_attention` on the CPU: the extra keys on an outer dimension, so that every sum runs along the head size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """[R, Hq, ...] as [R, Hkv, G, ...] in the accumulation dtype."""
    return x.to(accumulation(x.dtype)).unflatten(1, (key_heads, x.shape[1] // key_heads))


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """New lse [R, Hkv, G] and weights [R, 1 + m, Hkv, G, 1], the old keys' first."""
    scores = torch.einsum("rhgd,rmhd->rmhg", q, k)
    scores = torch.cat([lse[:, None], scores.mul_(scale)], 1)
    pivot = scores.amax(1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(pivot).exp_()
    total = weights.sum(1, keepdim=True)
    return (pivot + total.log())[:, 0], weights.div_(total.clamp(min=torch.finfo(scores.dtype).tiny))[..., None]


@implementation("extend_attention", "cpu")
def extend_attention(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype, key_heads = out.dtype, k.shape[2]
    old, q, lse = (_grouped(x, key_heads) for x in (out, q, lse))
    k, v = k.to(q.dtype), v.to(q.dtype)
    merged, weights = _weights(q, k, lse, scale)
    # A row without old keys has weight 0 on them; what stands in `out` there must not count, NaN included.
    result = torch.where(weights[:, 0] > 0, old * weights[:, 0], 0.0)
    for j in range(k.shape[1]):
        result.addcmul_(weights[:, 1 + j], v[:, j, :, None])
    return result.flatten(1, 2).to(dtype), merged.flatten(1)


@implementation("extend_attention_backward", "cpu")
def extend_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, key_heads = (out, lse, q, k, v), k.shape[2]
    g, old, q, lse = (_grouped(x, key_heads) for x in (grad_out, out, q, lse))
    k, v = k.to(q.dtype), v.to(q.dtype)
    weights = _weights(q, k, lse, scale)[1]
    has_old = weights[:, 0] > 0
    along = torch.cat([torch.where(has_old, g * old, 0.0)[:, None].sum(-1), torch.einsum("rhgd,rmhd->rmhg", g, v)], 1)
    weights = weights[..., 0]
    shift = (weights * along).sum(1, keepdim=True)
    if grad_lse is not None:
        shift -= _grouped(grad_lse, key_heads)[:, None]
    grad_scores = along.sub_(shift).mul_(weights)[..., None]
    grad_q = torch.zeros_like(q)
    for j in range(k.shape[1]):
        grad_q.addcmul_(grad_scores[:, 1 + j], k[:, j, :, None], value=scale)
    grads = (
        torch.where(has_old, g * weights[:, 0, ..., None], 0.0).flatten(1, 2),
        grad_scores[:, 0, ..., 0].flatten(1),
        grad_q.flatten(1, 2),
        torch.einsum("rmhg,rhgd->rmhd", grad_scores[:, 1:, ..., 0], q).mul_(scale),
        torch.einsum("rmhg,rhgd->rmhd", weights[:, 1:], g),
    )
    return tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True))
