"""FlashInfer's sampling and chain speculative sampling. They take probabilities: the softmax is in their time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import needs_gpu

NAME = "FlashInfer sampling"


def why_not(device: str) -> str | None:
    return needs_gpu("flashinfer", device)


def sample() -> Callable[[Tensor], Tensor]:
    """choose(logits [R, V]) -> tokens [R] at temperature 1."""
    from flashinfer.sampling import sampling_from_logits

    return lambda logits: sampling_from_logits(logits.float())


def sample_top_p(p: float) -> Callable[[Tensor], Tensor]:
    """choose(logits [R, V]) -> tokens [R] at temperature 1, cut at top-p."""
    from flashinfer.sampling import top_p_sampling_from_probs

    return lambda logits: top_p_sampling_from_probs(logits.float().softmax(-1), p)


def verify_chain() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """verify(target logits [B, K+1, V], draft logits [B, K, V], drafted [B, K]) -> tokens [B, K+1], padded with -1."""
    from flashinfer.sampling import chain_speculative_sampling

    def verify(target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        probabilities = draft.float().softmax(-1), target.float().softmax(-1)
        return chain_speculative_sampling(probabilities[0], tokens.to(torch.int32), probabilities[1])[0]

    return verify
