"""SGLang's tree verification kernels (sgl-kernel). A tree is first child and next sibling there; the argmax or softmax
that they need is in their time, the links are not: SGLang makes them while it builds the tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from beagle_kernels import DraftTree
from bench.peers import needs_gpu

NAME = "SGLang tree verification"


def why_not(device: str) -> str | None:
    return needs_gpu("sgl_kernel", device)


def links(tree: DraftTree) -> tuple[Tensor, Tensor, Tensor]:
    """(index, first child, next sibling) int64 [B, N]: nodes of the batch numbered through, links within a row."""
    batch, nodes = tree.parents.shape
    child, sibling = torch.full((batch, nodes), -1), torch.full((batch, nodes), -1)
    for row, parents in enumerate(tree.parents.tolist()):
        last: dict[int, int] = {}
        for node, parent in enumerate(parents):
            if parent < 0:
                continue
            if parent in last:
                sibling[row, last[parent]] = node
            else:
                child[row, parent] = node
            last[parent] = node
    index = torch.arange(batch * nodes).view(batch, nodes)
    device = tree.tokens.device
    return index.to(device), child.to(device), sibling.to(device)


def verify(tree: DraftTree, sampled: bool) -> Callable[[Tensor], Tensor]:
    """check(logits [B, N, V]) -> accepted drafted tokens [B], by argmax or at temperature 1."""
    import sgl_kernel

    batch, nodes = tree.tokens.shape
    device, linked = tree.tokens.device, links(tree)
    rejection = sgl_kernel.tree_speculative_sampling_target_only
    # older versions take the draft's probabilities, which they do not read
    with_draft = "draft_probs" in inspect.signature(rejection).parameters

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        sizes = (batch * nodes,), (batch, tree.max_depth + 1)
        predicted, index = (torch.full(size, -1, dtype=torch.int32, device=device) for size in sizes)
        return predicted, index, torch.zeros(batch, dtype=torch.int32, device=device)

    def greedy(logits: Tensor) -> Tensor:
        out = outputs()
        sgl_kernel.verify_tree_greedy(*out, tree.tokens, *linked, logits.argmax(-1))
        return out[2]

    def random(logits: Tensor) -> Tensor:
        out, law = outputs(), logits.float().softmax(-1)
        coins = torch.rand(batch, nodes, device=device), torch.rand(batch, device=device)
        drafts = (torch.zeros_like(law),) if with_draft else ()
        rejection(*out, tree.tokens, *linked, *coins, law, *drafts)
        return out[2]

    return random if sampled else greedy
