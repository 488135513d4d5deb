"""Sampling as greedy decoding of perturbed logits (coupled sampling).

With Gumbel noise g(seed, position, token) the token of a row is argmax(filtered(z) + T g), lowest id on ties: an exact
sample of softmax(filtered(z) / T) by the Gumbel-max theorem, and argmax z at T = 0. The noise belongs to the position
and the token, not to the model, so a draft and a target that use it choose alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import Sampling


def choose_tokens(
    logits: Tensor,
    positions: Tensor,
    sampling: Sampling,
    *,
    stream: int = 0,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose one token a row of logits.

    logits [R, V] f32, f16 or bf16, any strides; positions int64 [R], the index in the unpadded sequence of the token
    being chosen; sampling, R rows. stream and rounds (int64 [R], None is 0) key the noise: leave them for coupled
    sampling; the tokens of a draft that `verify_chain` will judge use stream 1 and rounds = the position of the
    round's first drafted token.

    Returns tokens int64 [R] and status int32 [R]: STATUS_NAN (NaN is taken as -inf), STATUS_NO_FINITE (token 0); +inf
    counts as the largest finite number. Raises ValueError or TypeError on wrong shapes and dtypes.
    """
    checks.tensor("choose_tokens", "logits", logits, [None, None], checks.LOGITS)
    rows, vocab = logits.shape
    checks.at_least("choose_tokens", "the vocabulary of logits", vocab, 1)
    checks.tensor("choose_tokens", "positions", positions, [rows], [torch.int64])
    checks.sampling("choose_tokens", sampling, rows)
    if rounds is not None:
        checks.tensor("choose_tokens", "rounds", rounds, [rows], [torch.int64])
    if not 0 <= stream < 4:
        raise ValueError(f"choose_tokens: stream is {stream}; allowed: 0 to 3")
    checks.same_device("choose_tokens", logits=logits, positions=positions, seed=sampling.seed, rounds=rounds)
    return torch.ops.beagle.choose_tokens(logits, positions, *sampling, stream, rounds, backend)


@backends.operator("choose_tokens")
def _choose_tokens(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: int = 0,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    args = (logits, positions, seed, temperature, top_k, top_p, min_p, stream, rounds)
    return backends.call("choose_tokens", backend, logits.device, *args)


@_choose_tokens.register_fake
def _(logits, positions, seed, temperature, top_k, top_p, min_p, stream=0, rounds=None, backend="auto"):
    return positions.new_empty(logits.shape[0]), positions.new_empty(logits.shape[0], dtype=torch.int32)
