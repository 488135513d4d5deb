"""Choose at every node, then accept: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from .accept_tree import accept_tree
from .choose_tokens import choose_tokens


@implementation("verify_tree", "reference")
def verify_tree(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, nodes = tokens.shape
    in_use = torch.arange(nodes, device=tokens.device) < size.clamp(min=1)[:, None]
    row, node = in_use.nonzero(as_tuple=True)
    at = positions[row] + torch.where(node > 0, depth[row, node], 0)
    settings = (field[row] for field in (seed, temperature, top_k, top_p, min_p))
    choice, flags = choose_tokens(logits[row, node], at, *settings)

    chosen = torch.zeros_like(tokens).index_put((row, node), choice)
    status = torch.zeros(batch, nodes, dtype=torch.int32, device=tokens.device).index_put((row, node), flags)
    path, num_accepted, next_token, bad = accept_tree(tokens, parents, depth, mask, size, max_depth, chosen)
    on_path = status.gather(1, path.long().clamp(min=0))  # the root's beyond the path's end
    return path, num_accepted, next_token, bad | (on_path & 1).amax(1) | (on_path & 2).amax(1)
