"""Verification of a draft tree from the target's logits: choose at every node, then accept.

The choice at a node uses the noise of the position being chosen, positions + depth. Where a drafted child equals it,
the child is what plain decoding with the same seed would have emitted: the text does not depend on the draft.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .accept_tree import empty_verdict
from .types import DraftTree, Sampling, Verdict


def verify_tree(
    logits: Tensor, tree: DraftTree, positions: Tensor, sampling: Sampling, *, backend: str = "auto"
) -> Verdict:
    """`choose_tokens` at every node, then `accept_tree`.

    logits [B, N, V] f32, f16 or bf16, any strides; positions int64 [B] of the token chosen at the root, node i uses
    positions + depth[i]; sampling, B rows. Returns a Verdict; its status joins those of the nodes on the path; logits
    of padding nodes are not read, nor on the host those that no choice leads to. Raises ValueError or TypeError on
    wrong shapes and dtypes; the "cuda" backend takes B up to 65535 (BackendError).
    """
    batch, nodes = checks.tree("verify_tree", tree)
    checks.tensor("verify_tree", "logits", logits, (batch, nodes, None), checks.LOGITS)
    checks.at_least("verify_tree", "the vocabulary of logits", logits.shape[2], 1)
    checks.tensor("verify_tree", "positions", positions, (batch,), checks.INT64)
    checks.sampling("verify_tree", sampling, batch)
    checks.same_device("verify_tree", logits=logits, tree=tree.tokens, positions=positions, seed=sampling.seed)
    return Verdict(*torch.ops.beagle.verify_tree.default(logits, *tree, positions, *sampling, backend))


@backends.operator("verify_tree")
def _verify_tree(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    depth: Tensor,
    mask: Tensor,
    size: Tensor,
    max_depth: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tree, settings = (tokens, parents, depth, mask, size, max_depth), (seed, temperature, top_k, top_p, min_p)
    return backends.call("verify_tree", backend, logits.device, logits, *tree, positions, *settings)


@_verify_tree.register_fake
def _(
    logits,
    tokens,
    parents,
    depth,
    mask,
    size,
    max_depth,
    positions,
    seed,
    temperature,
    top_k,
    top_p,
    min_p,
    backend="auto",
):
    return empty_verdict(tokens, size, max_depth)
