"""Perturbed logits: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from .sampling import clean, perturb


@implementation("perturb_logits", "reference")
def perturb_logits(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    if not len(logits):
        return logits.new_empty(logits.shape, dtype=torch.float32), positions.int()
    z, status = clean(logits)
    value = perturb(z, positions, seed, temperature, top_k, top_p, min_p, torch.inf)
    return torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value), status
