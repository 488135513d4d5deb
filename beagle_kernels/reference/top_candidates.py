"""Top-k of the perturbed logits with their log-softmax: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from .sampling import clean, perturb


@implementation("top_candidates", "reference")
def top_candidates(
    logits: Tensor,
    k: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not len(logits):
        return positions.new_empty(0, k), logits.new_empty(0, k, dtype=torch.float32)
    z, status = clean(logits)
    value = perturb(z, positions, seed, temperature, top_k, top_p, min_p, 2.0, token_ids=token_ids)
    column = rank(value).topk(k, dim=-1).indices
    kept = value.gather(1, column)
    tokens = column if token_ids is None else token_ids[column]
    # a row without a number is the point mass on column 0 for the sampler, but has no candidate worth drafting
    finite = (kept > -torch.inf) & (status < 2)[:, None]
    # the others' noise is not drawn: they count as without it
    others = z.scatter(1, column, -torch.inf)
    scores = kept - torch.logaddexp(kept.logsumexp(-1, keepdim=True), others.logsumexp(-1, keepdim=True))
    return torch.where(finite, tokens, 0), torch.where(finite, scores, -torch.inf)


def rank(value: Tensor) -> Tensor:
    """int64 keys that sort as (value, lowest column first) and are all different: topk promises no order of ties."""
    bits = (value + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) - torch.arange(value.shape[1], device=value.device)
