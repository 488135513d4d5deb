"""`accept_tree` by the compiled executors: a row a team."""

from __future__ import annotations

from torch import Tensor

from ..accept_tree import empty_verdict
from ..extension import addresses, compiled, executor, flat


@compiled("accept_tree")
def accept_tree(
    tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, size: Tensor, max_depth: int, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    verdict = empty_verdict(tokens, size, max_depth)
    kept, (*fields, choice) = flat(tokens, parents, depth, mask, size, chosen)
    tree = (*fields, tokens.shape[1], mask.shape[2], max_depth)
    with executor(tokens.device) as (module, where):
        module.accept_tree(where, *tree, len(tokens), choice, *addresses(verdict))
    return verdict
