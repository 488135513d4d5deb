"""The definition of `tree_attention`: dense scores over every slot under a mask unpacked from the words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation


def visible_slots(slots: int, lengths: Tensor, mask: Tensor) -> Tensor:
    """Which of a row's slots each node sees, bool [B, N, slots]: the first lengths[b], then by the node's bits."""
    node = torch.arange(slots, device=mask.device) - lengths.long().clamp(min=0)[:, None, None]
    bit = node.clamp(0, 64 * mask.shape[-1] - 1)
    words = mask.gather(2, (bit // 64).expand(-1, mask.shape[1], -1))
    return (node < 0) | ((words >> (bit % 64) & 1).bool() & (node == bit))


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """Pages [P, Hkv, page, D] in the order of the table [B, max_pages]: [B, Hkv, max_pages * page, D]."""
    chosen = pages[block_table.long().clamp(0, pages.shape[0] - 1)]
    return chosen.transpose(1, 2).flatten(2, 3)


@implementation("tree_attention", "reference")
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    if block_table is not None:
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    batch, nodes, heads, width = q.shape
    if k.shape[2] == 0:
        return torch.zeros_like(q)
    acc = accumulation(q.dtype)
    visible = visible_slots(k.shape[2], lengths, mask)
    grouped = q.to(acc).reshape(batch, nodes, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("bnhgd,bhsd->bhgns", grouped, k.to(acc)) * scale
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    pivot = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(acc).min)
    weights = torch.exp(scores - pivot)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(acc).tiny)
    # Slots nobody sees may hold anything, NaN included: 0 times it must stay 0.
    values = v.to(acc).masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    return torch.einsum("bhgns,bhsd->bnhgd", weights, values).reshape(q.shape).to(q.dtype)
