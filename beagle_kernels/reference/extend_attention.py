"""The definition of `extend_attention` and of its gradient: one softmax over the old lse and the new scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """New lse [R, Hkv, G] and weights [R, Hkv, G, 1 + m]: the old keys' together, then each extra key's."""
    scores = torch.einsum("rhgd,rmhd->rhgm", q, k) * scale
    scores = torch.cat([lse.reshape(*q.shape[:3], 1), scores], -1)
    merged = scores.logsumexp(-1)
    return merged, torch.exp(scores - merged.masked_fill(merged == float("-inf"), 0.0)[..., None])


@implementation("extend_attention", "reference")
def extend_attention(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    acc, dtype, shape = accumulation(q.dtype), out.dtype, out.shape
    grouped = (q.shape[0], k.shape[2], q.shape[1] // k.shape[2], q.shape[2])
    out, q, k, v = out.to(acc).reshape(grouped), q.to(acc).reshape(grouped), k.to(acc), v.to(acc)
    merged, weights = _weights(q, k, lse, scale)
    # A row without old keys has weight 0 on them; what stands in `out` there must not count, NaN included.
    old = torch.where(weights[..., :1] > 0, out * weights[..., :1], 0.0)
    result = old + torch.einsum("rhgm,rmhd->rhgd", weights[..., 1:], v)
    return result.reshape(shape).to(dtype), merged.reshape(lse.shape).contiguous()


@implementation("extend_attention_backward", "reference")
def extend_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The old keys act as one key of score lse and value out, each extra key as itself: dS = P (g . v - mean + h)."""
    acc, inputs = accumulation(q.dtype), (out, lse, q, k, v)
    grouped = (q.shape[0], k.shape[2], q.shape[1] // k.shape[2], q.shape[2])
    out, q, grad_out = (x.to(acc).reshape(grouped) for x in (out, q, grad_out))
    k, v = k.to(acc), v.to(acc)
    weights = _weights(q, k, lse, scale)[1]
    old = torch.where(weights[..., :1] > 0, out, 0.0)
    along = torch.cat([(grad_out * old).sum(-1, True), torch.einsum("rhgd,rmhd->rhgm", grad_out, v)], -1)
    shift = (weights * along).sum(-1, True)
    if grad_lse is not None:
        shift = shift - grad_lse.reshape(shift.shape)
    grad_scores = weights * (along - shift)
    extra = grad_scores[..., 1:] * scale
    grads = (
        torch.where(weights[..., :1] > 0, grad_out * weights[..., :1], 0.0),
        grad_scores[..., 0],
        torch.einsum("rhgm,rmhd->rhgd", extra, k),
        torch.einsum("rhgm,rhgd->rmhd", extra, q),
        torch.einsum("rhgm,rhgd->rmhd", weights[..., 1:], grad_out),
    )
    return tuple(grad.reshape(x.shape).to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True))
