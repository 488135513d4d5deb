"""Perturbed argmax: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from .sampling import clean, perturb


@implementation("choose_tokens", "reference")
def choose_tokens(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: int = 0,
    rounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not len(logits):
        return positions.clone(), positions.int()
    z, status = clean(logits)
    value = perturb(z, positions, seed, temperature, top_k, top_p, min_p, torch.inf, stream, rounds)
    return value.argmax(-1), status
