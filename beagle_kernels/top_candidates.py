"""A draft's ranking of its candidates, leaning the way coupled sampling will lean.

The draft ranks by its own z + T g with the noise the target will use at that position, so both sides prefer the same
tokens. Where the target filters, the draft leans without cutting: what its own filters would drop loses 2 T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import Sampling


def top_candidates(
    logits: Tensor,
    k: int,
    positions: Tensor,
    sampling: Sampling,
    *,
    token_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each row by perturbed logit, best first, lowest id on ties.

    logits [R, V] f32, f16 or bf16; positions int64 [R] of the tokens being drafted; sampling, R rows. token_ids int64
    [V], ascending: the full ids of a reduced vocabulary; noise, ties and output use them.

    Returns tokens int64 [R, k] and scores f32 [R, k]: the values z + T g, less 2 T where a filter would drop, minus the
    log of the sum of their exponentials and of exp(z) over the tokens that are not kept, whose noise is not drawn (at
    temperature 0: the log-softmax of z). Tokens at -inf or NaN are never kept: a row with fewer than k others ends in
    token 0 with score -inf. Raises ValueError or TypeError on wrong shapes, dtypes, or k outside 1..V; the "cuda"
    backend takes k up to 1024 and R up to 65535 (BackendError).
    """
    checks.tensor("top_candidates", "logits", logits, [None, None], checks.LOGITS)
    rows, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise ValueError(f"top_candidates: k is {k}; allowed: 1 to the {vocab} columns of logits")
    checks.tensor("top_candidates", "positions", positions, [rows], [torch.int64])
    checks.sampling("top_candidates", sampling, rows)
    if token_ids is not None:
        checks.tensor("top_candidates", "token_ids", token_ids, [vocab], [torch.int64])
    checks.same_device("top_candidates", logits=logits, positions=positions, seed=sampling.seed, token_ids=token_ids)
    return torch.ops.beagle.top_candidates(logits, k, positions, *sampling, token_ids, backend)


@backends.operator("top_candidates")
def _top_candidates(
    logits: Tensor,
    k: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    token_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    args = (logits, k, positions, seed, temperature, top_k, top_p, min_p, token_ids)
    return backends.call("top_candidates", backend, logits.device, *args)


@_top_candidates.register_fake
def _(logits, k, positions, seed, temperature, top_k, top_p, min_p, token_ids=None, backend="auto"):
    shape = (logits.shape[0], k)
    return positions.new_empty(shape), positions.new_empty(shape, dtype=torch.float32)
