"""A chain's tokens walked down the candidates, those not met appended: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import implementation


@implementation("join_branch", "reference")
def join_branch(
    tokens: Tensor, scores: Tensor, parents: Tensor, branch_tokens: Tensor, branch_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, count), steps = tokens.shape, branch_tokens.shape[1]
    index = torch.arange(count + steps, device=tokens.device)
    tokens, scores = pad(tokens, (0, steps)), pad(scores, (0, steps), value=-torch.inf)
    parents = pad(parents, (0, steps), value=-1)

    at = parents.new_full((batch, 1), -1)
    going, bound = at < 0, scores.new_zeros(batch, 1)
    for step in range(steps):
        token, score = branch_tokens[:, step : step + 1], branch_scores[:, step : step + 1]
        going = going & (token >= 0) & (score > -torch.inf)  # of NaN too it is false
        bound = torch.minimum(bound, score)
        same = (parents == at) & (index > at) & (tokens == token) & (scores > -torch.inf)
        place = torch.where(same.any(1, keepdim=True), same.int().argmax(1, keepdim=True), count + step).int()
        # No child comes above its parent. A candidate met is raised to `bound` at most, and where it has a parent, that
        # was met before it and raised to a bound no lower. What is appended has `bound` for its score likewise.
        here = going & (index == place)
        scores = torch.where(here, torch.maximum(scores, bound), scores)
        tokens, parents = torch.where(here, token, tokens), torch.where(here, at, parents)
        at = torch.where(going, place, at)
    return tokens, scores, parents
