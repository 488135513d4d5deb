"""A chain of tokens from the root joins the candidates of a draft tree, before `build_tree` keeps the best.

The chain is walked down from the root. While its next token is a child of where the walk stands, that candidate is met,
and its score raised to the chain's where that is higher; from the first token that is none on, the rest of the chain is
appended. What build_tree asks of candidates holds for the result if it held before: parents come first, and no child
scores above its parent, since on the chain each was raised no higher than the one above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks


def join_branch(
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    branch_tokens: Tensor,
    branch_scores: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Join a chain of tokens below the root with the candidates of each row.

    tokens int64 [B, M], scores f32 [B, M], parents int32 [B, M]: candidates as build_tree takes them. branch_tokens
    int64 [B, D], the chain: it ends before the first negative token, score of -inf, or NaN. branch_scores f32 [B, D]:
    its cumulative log-probabilities, each taken as the least of those up to it and 0. M and D may be 0.

    Returns the same three, of M + D columns: a candidate that the chain meets (the first child with its token, of a
    score above -inf) has the higher of both scores, the others are as given; token i of the chain is in column M + i
    unless it was met, with the chain's score. Columns not used have token 0, score -inf and parent -1. A tree of the
    result may be as deep as the chain: build_tree's max_depth must allow it. Raises ValueError or TypeError on wrong
    shapes and dtypes.
    """
    checks.tensor("join_branch", "tokens", tokens, (None, None), checks.INT64)
    checks.tensor("join_branch", "scores", scores, tokens.shape, checks.FLOAT32)
    checks.tensor("join_branch", "parents", parents, tokens.shape, checks.INT32)
    checks.tensor("join_branch", "branch_tokens", branch_tokens, (tokens.shape[0], None), checks.INT64)
    checks.tensor("join_branch", "branch_scores", branch_scores, branch_tokens.shape, checks.FLOAT32)
    given = {"tokens": tokens, "scores": scores, "parents": parents}
    checks.same_device("join_branch", **given, branch_tokens=branch_tokens, branch_scores=branch_scores)
    return torch.ops.beagle.join_branch.default(tokens, scores, parents, branch_tokens, branch_scores, backend)


@backends.operator("join_branch")
def _join_branch(
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    branch_tokens: Tensor,
    branch_scores: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    args = (tokens, scores, parents, branch_tokens, branch_scores)
    return backends.call("join_branch", backend, tokens.device, *args)


@_join_branch.register_fake
def _(tokens, scores, parents, branch_tokens, branch_scores, backend="auto"):
    return empty_candidates(tokens, scores, parents, branch_tokens.shape[1])


def empty_candidates(tokens: Tensor, scores: Tensor, parents: Tensor, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised candidates of so many more columns than those given."""
    batch, count = tokens.shape
    return tuple(x.new_empty(batch, count + more) for x in (tokens, scores, parents))  # type: ignore[return-value]
