"""The dynamic draft tree of EAGLE-2 (arXiv 2406.16858): the best nodes overall, ancestors included.

A candidate's score is the sum of log-probabilities along its path, so no child scores above its parent, and the
num_nodes - 1 best candidates (ties: lower index first, so a parent wins against its child) always hold their ancestors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import DraftTree


def build_tree(
    root: Tensor,
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    num_nodes: int,
    max_depth: int,
    *,
    backend: str = "auto",
) -> DraftTree:
    """Keep the num_nodes - 1 best candidates of each row, under the root.

    root int64 [B]; candidates in an order that puts parents first: tokens int64 [B, M], cumulative scores f32 [B, M]
    (a child's never above its parent's; -inf and NaN are never kept), parents int32 [B, M], the parent's candidate
    index or -1 for the root. num_nodes 1 to 1024, the root counted; max_depth bounds the depth of a kept candidate.

    Returns a DraftTree: node 0 the root, then the kept candidates in their input order; padding nodes have token 0,
    parent -1, depth 0 and their own bit only. A row that breaks a rule above (a parent that does not precede its child,
    a score above the parent's, a kept node deeper than max_depth, a negative token id) becomes a tree of size 0, which
    verification answers with STATUS_BAD_TREE. Raises ValueError or TypeError on wrong shapes, dtypes and bounds.
    """
    checks.tensor("build_tree", "root", root, (None,), checks.INT64)
    checks.tensor("build_tree", "tokens", tokens, (root.shape[0], None), checks.INT64)
    checks.tensor("build_tree", "scores", scores, tokens.shape, checks.FLOAT32)
    checks.tensor("build_tree", "parents", parents, tokens.shape, checks.INT32)
    checks.at_least("build_tree", "num_nodes", num_nodes, 1, checks.MAX_NODES)
    checks.at_least("build_tree", "max_depth", max_depth, 0)
    checks.same_device("build_tree", root=root, tokens=tokens, scores=scores, parents=parents)
    built = torch.ops.beagle.build_tree.default(root, tokens, scores, parents, num_nodes, max_depth, backend)
    return DraftTree._make((*built, max_depth))


@backends.operator("build_tree")
def _build_tree(
    root: Tensor,
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    num_nodes: int,
    max_depth: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backends.call("build_tree", backend, root.device, root, tokens, scores, parents, num_nodes, max_depth)


@_build_tree.register_fake
def _(root, tokens, scores, parents, num_nodes, max_depth, backend="auto"):
    nodes, words = (root.shape[0], num_nodes), (num_nodes + 63) // 64
    return (
        root.new_empty(nodes),
        root.new_empty(nodes, dtype=torch.int32),
        root.new_empty(nodes, dtype=torch.int32),
        root.new_empty((*nodes, words)),
        root.new_empty(root.shape[0], dtype=torch.int32),
    )
