"""The definition of `tree_attention`: dense scores over every slot under a mask unpacked from the words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import accumulation


def visible_slots(slots: int, lengths: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Which of a row's slots each node sees, bool [B, N, slots]: the first lengths[b], then by the node's bits; of
    both those from starts[b, n] on."""
    slot = torch.arange(slots, device=mask.device)
    node = slot - lengths.long().clamp(min=0)[:, None, None]
    bit = node.clamp(0, 64 * mask.shape[-1] - 1)
    words = mask.gather(2, (bit // 64).expand(-1, mask.shape[1], -1))
    visible = (node < 0) | ((words >> (bit % 64) & 1).bool() & (node == bit))
    return visible if starts is None else visible & (slot >= starts[..., None])


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """Pages [P, Hkv, page, D] in the order of the table [B, max_pages]: [B, Hkv, max_pages * page, D]."""
    chosen = pages[block_table.long().clamp(0, pages.shape[0] - 1)]
    return chosen.transpose(1, 2).flatten(2, 3)


@implementation("tree_attention", "reference")
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    if block_table is not None:
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    batch, nodes, heads, width = q.shape
    if k.shape[2] == 0:
        return q.new_zeros(batch, nodes, heads, v.shape[3])
    acc = accumulation(q.dtype)
    visible = visible_slots(k.shape[2], lengths, mask, starts)
    grouped = q.to(acc).reshape(batch, nodes, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("bnhgd,bhsd->bhgns", grouped, k.to(acc)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    pivot = top.clamp(min=torch.finfo(acc).min)
    weights = torch.exp(scores - pivot)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(acc).view(k.shape[1], -1, 1, 1)
        total = total + torch.exp(sink - pivot).masked_fill(top == float("-inf"), 0.0)
    weights = weights / total.clamp(min=torch.finfo(acc).tiny)
    # Slots nobody sees may hold anything, NaN included: 0 times it must stay 0.
    values = v.to(acc).masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    return torch.einsum("bhgns,bhsd->bnhgd", weights, values).flatten(2, 3).to(q.dtype)
