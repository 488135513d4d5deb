"""Rank, keep, relabel, close over ancestors: the definition of the dynamic tree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import implementation


@implementation("build_tree", "reference")
def build_tree(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, num_nodes: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, candidates = tokens.shape
    scores, parents = torch.where(scores.isnan(), -torch.inf, scores), parents.long()
    index = torch.arange(candidates, device=root.device)
    real = scores > -torch.inf

    # candidate i is row i + 1 of these, the root row 0, so that parent -1 needs no special case
    above = pad(scores, (1, 0), value=torch.inf).gather(1, (parents + 1).clamp(0, candidates))
    wrong = (parents < -1) | (parents >= index) | real & ((scores > above) | (tokens < 0))
    valid = ~wrong.any(1) & (root >= 0)

    order = scores.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, index.expand_as(order))
    kept = pad(real & (place < num_nodes - 1), (1, 0), value=True) & valid[:, None]
    size = kept.sum(1)
    label = torch.where(kept, kept.cumsum(1) - 1, num_nodes)

    def nodes(values: Tensor, padding: int) -> Tensor:
        """The kept rows of [B, 1 + M] in their order, padded to [B, num_nodes]; the others land in a last column."""
        out = values.new_full((batch, num_nodes + 1), padding)
        return out.scatter_(1, label, values)[:, :num_nodes]

    parent = pad(label.gather(1, (parents + 1).clamp(0, candidates)), (1, 0), value=-1)
    parent = nodes(torch.where(kept, parent, -1), -1)
    reach = torch.eye(num_nodes, dtype=torch.bool, device=root.device).expand(batch, -1, -1)
    for _ in range(min(max_depth, num_nodes - 1)):
        step = reach.gather(1, parent.clamp(min=0)[:, :, None].expand_as(reach))
        reach = reach | step & (parent >= 0)[:, :, None]
    in_use = torch.arange(num_nodes, device=root.device) < size[:, None]
    size = size * (reach[:, :, 0] | ~in_use).all(1)

    in_use, alone = in_use & (size > 0)[:, None], torch.eye(num_nodes, dtype=torch.bool, device=root.device)
    reach = torch.where(in_use[:, :, None], reach, alone)
    all_tokens = nodes(torch.cat((root[:, None], tokens), 1), 0)
    return (
        torch.where(in_use, all_tokens, 0),
        torch.where(in_use, parent, -1).int(),
        (reach.sum(2) - 1).int(),
        pack(reach),
        size.int(),
    )


def pack(mask: Tensor) -> Tensor:
    """Bits [..., N] -> int64 words [..., ceil(N / 64)]: bit b of word w is column 64 w + b."""
    bits = pad(mask, (0, -mask.shape[-1] % 64)).unflatten(-1, (-1, 64))
    return (bits.long() << torch.arange(64, device=mask.device)).sum(-1)


def unpack(words: Tensor, columns: int) -> Tensor:
    """The inverse of pack: int64 words [..., W] -> bool [..., columns]."""
    bits = words[..., None] >> torch.arange(64, device=words.device) & 1
    return bits.flatten(-2)[..., :columns].bool()
