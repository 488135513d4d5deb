"""Random batches of packed sequences, and attention written out, for tests of drafts' training passes."""

from __future__ import annotations

import torch

from beagle_sd.data.batch import Batch

DTYPE = torch.float64


def make_batch(lengths: list[int], width: int = 64) -> Batch:
    torch.manual_seed(3)
    total = sum(lengths)
    return Batch(
        torch.randint(0, 97, (total,)),
        torch.randn(total, width, dtype=DTYPE),
        torch.rand(total) < 0.8,
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        torch.cat([torch.arange(length) for length in lengths]),
    )


def dense_attention(queries, keys, values, visible):
    """Plain softmax attention [T, Hq, D] over keys [K, Hkv, D] with a bool mask [T, K]; rows without a key give 0."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("thd,khd->htk", queries, keys) * queries.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(1)
    weights = torch.softmax(scores.masked_fill(empty[None, :, None], 0.0), -1).masked_fill(empty[None, :, None], 0.0)
    return torch.einsum("htk,khd->thd", weights, values)
