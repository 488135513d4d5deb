"""Bit-parallel acceptance: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import STATUS_BAD_TREE
from .build_tree import pack, unpack


@implementation("accept_tree", "reference")
def accept_tree(
    tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, size: Tensor, max_depth: int, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nodes = tokens.shape[1]
    index = torch.arange(nodes, device=tokens.device)
    in_use = index < size[:, None]
    up = parents.long().clamp(0, nodes - 1)
    valid = well_formed(parents, depth, mask, size, max_depth, up)

    match = (tokens == chosen.gather(1, up)) & in_use & valid[:, None]
    match[:, 0] = True
    accepted = (mask & ~pack(match)[:, None] == 0).all(-1) & match
    best = torch.where(accepted, depth * nodes - index, -nodes).argmax(1, keepdim=True)
    best = torch.where(valid[:, None], best, 0)

    on_path = unpack(mask.gather(1, best[:, :, None].expand(-1, -1, mask.shape[2]))[:, 0], nodes)
    on_path = torch.where(valid[:, None], on_path, index == 0)
    count = on_path.sum(1, keepdim=True)
    ordered = torch.where(on_path, index, nodes).sort(1).values
    step = torch.arange(max_depth + 1, device=tokens.device)
    path = ordered.gather(1, step.clamp(max=nodes - 1).expand(len(tokens), -1))
    path = torch.where(step < count, path, -1)
    return path.int(), count[:, 0].int() - 1, chosen.gather(1, best)[:, 0], (~valid * STATUS_BAD_TREE).int()


def well_formed(parents: Tensor, depth: Tensor, mask: Tensor, size: Tensor, max_depth: int, up: Tensor) -> Tensor:
    """bool [B]: each node in use has a parent before it, that parent's depth plus one and its mask plus the own bit."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    root = index == 0
    own = pack(torch.eye(nodes, dtype=torch.bool, device=parents.device))
    inherited = mask.gather(1, up[:, :, None].expand_as(mask))
    own_only = torch.where(root[:, None], 0, inherited) | own
    good = torch.where(root, parents == -1, (parents >= 0) & (parents < index))
    good &= depth == torch.where(root, 0, depth.gather(1, up) + 1)
    good &= (depth <= max_depth) & (mask == own_only).all(-1)
    return (good | (index >= size[:, None])).all(1) & (size >= 1) & (size <= nodes)
