"""Acceptance of a draft tree in bit-parallel form.

Let match hold the root and every node whose token equals its parent's choice. A node is accepted if its ancestor mask
is a subset of match: no walk, one AND per word. The deepest accepted node wins, lowest index on ties; its mask is the
path, and the choice at it is the next token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import DraftTree, Verdict


def accept_tree(tree: DraftTree, chosen: Tensor, *, backend: str = "auto") -> Verdict:
    """Accept the deepest path on which every node is what the target chose at its parent.

    chosen int64 [B, N]: the target's choice at each node. Returns a Verdict. A row whose tree is invalid (size outside
    1..N; a parent that does not precede its node; a depth that is not its parent's plus one or exceeds max_depth; a
    mask that is not its parent's plus the own bit) accepts nothing: path is the root, next_token the choice there,
    status STATUS_BAD_TREE. Raises ValueError or TypeError on wrong shapes and dtypes.
    """
    batch, nodes = checks.tree("accept_tree", tree)
    checks.tensor("accept_tree", "chosen", chosen, (batch, nodes), checks.INT64)
    checks.same_device("accept_tree", tree=tree.tokens, chosen=chosen)
    return Verdict(*torch.ops.beagle.accept_tree.default(*tree, chosen, backend))


@backends.operator("accept_tree")
def _accept_tree(
    tokens: Tensor,
    parents: Tensor,
    depth: Tensor,
    mask: Tensor,
    size: Tensor,
    max_depth: int,
    chosen: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (tokens, parents, depth, mask, size, max_depth, chosen)
    return backends.call("accept_tree", backend, tokens.device, *args)


@_accept_tree.register_fake
def _(tokens, parents, depth, mask, size, max_depth, chosen, backend="auto"):
    return empty_verdict(tokens, size, max_depth)


def empty_verdict(tokens: Tensor, ints: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised fields of a Verdict for B = len(tokens) rows, of the dtypes of tokens (int64) and ints (int32)."""
    batch = tokens.shape[0]
    path = ints.new_empty(batch, max_depth + 1)
    return path, ints.new_empty(batch), tokens.new_empty(batch), ints.new_empty(batch)
