"""`join_branch` by the compiled executors: a row a team."""

from __future__ import annotations

from torch import Tensor

from ..extension import addresses, compiled, executor, flat
from ..join_branch import empty_candidates


@compiled("join_branch")
def join_branch(
    tokens: Tensor, scores: Tensor, parents: Tensor, branch_tokens: Tensor, branch_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    steps = branch_tokens.shape[1]
    joined = empty_candidates(tokens, scores, parents, steps)
    kept, inputs = flat(tokens, scores, parents, branch_tokens, branch_scores)
    with executor(tokens.device) as (module, where):
        module.join_branch(where, *inputs, *tokens.shape, steps, *addresses(joined))
    return joined
