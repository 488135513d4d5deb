"""Coupled sampling for an engine that verifies greedily: logits whose argmax is the sampled token.

Where `choose_tokens` gives the argmax of filtered(z) + T g, this gives the values themselves. An engine that accepts a
drafted token if it is the argmax, and goes on with the argmax, then writes what plain sampling with the same noise
would, whatever its draft proposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import Sampling


def perturb_logits(
    logits: Tensor, positions: Tensor, sampling: Sampling, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """filtered(z) + T g of each row, with the noise that `choose_tokens` draws: its argmax, the lowest id on ties, is
    the token that `choose_tokens` chooses on the same backend.

    logits [R, V] f32, f16 or bf16, any strides; positions int64 [R], the index in the unpadded sequence of the token
    being chosen; sampling, R rows.

    Returns values f32 [R, V], -inf where a filter drops, the logits themselves at temperature 0; and status int32 [R]:
    STATUS_NAN (NaN is taken as -inf), STATUS_NO_FINITE (the row is that of a logit 0 of token 0, all others -inf); +inf
    counts as the largest finite number. Raises ValueError or TypeError on wrong shapes and dtypes.
    """
    checks.tensor("perturb_logits", "logits", logits, [None, None], checks.LOGITS)
    rows, vocab = logits.shape
    checks.at_least("perturb_logits", "the vocabulary of logits", vocab, 1)
    checks.tensor("perturb_logits", "positions", positions, [rows], [torch.int64])
    checks.sampling("perturb_logits", sampling, rows)
    checks.same_device("perturb_logits", logits=logits, positions=positions, seed=sampling.seed)
    return torch.ops.beagle.perturb_logits(logits, positions, *sampling, backend)


@backends.operator("perturb_logits")
def _perturb_logits(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    args = (logits, positions, seed, temperature, top_k, top_p, min_p)
    return backends.call("perturb_logits", backend, logits.device, *args)


@_perturb_logits.register_fake
def _(logits, positions, seed, temperature, top_k, top_p, min_p, backend="auto"):
    values = logits.new_empty(logits.shape, dtype=torch.float32)
    return values.contiguous(), positions.new_empty(logits.shape[0], dtype=torch.int32)
