"""What a layer's queries see of a text and of a tree: windows and chunks by position, in words and as a 4-D mask."""

from __future__ import annotations

import pytest
import torch

from beagle_kernels.reference.build_tree import pack
from beagle_kernels.reference.tree_attention import visible_slots
from beagle_sd.models.layers.attention import Span, packed, seen, visible_keys


def tree(count: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestors bool [N, N], each node's own too, and depths [N] of a random tree whose parents come first."""
    among, depth = torch.eye(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    for node in range(1, count):
        parent = int(torch.randint(max(0, node - 3), node, (), generator=gen))
        among[node] |= among[parent]
        depth[node] = depth[parent] + 1
    return among, depth


@pytest.mark.parametrize(
    "span", [Span(), Span(window=1), Span(window=5), Span(window=90), Span(chunk=6), Span(chunk=64)]
)
@pytest.mark.parametrize("count", [1, 13, 70])
def test_what_is_seen_follows_from_positions(span, count):
    gen = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 5, 40], dtype=torch.int32)
    trees = [tree(count, gen) for _ in lengths]
    among, depth = (torch.stack(part) for part in zip(*trees, strict=True))
    words, starts = seen(pack(among), lengths, depth, span)
    slots = int(lengths.max()) + count
    wanted = torch.zeros(3, count, slots, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        position = [*range(length), *(length + depth[row]).tolist()]
        for node in range(count):
            own = position[length + node]
            for slot, at in enumerate(position):
                near = own - at < (span.window or 1000) and (
                    span.chunk is None or at // span.chunk == own // span.chunk
                )
                wanted[row, node, slot] = near and (slot < length or bool(among[row, node, slot - length]))
    by_words = visible_slots(slots, lengths, words)
    if starts is not None:
        by_words &= torch.arange(slots) >= starts[:, :, None]
    assert by_words.equal(wanted)
    assert visible_keys(lengths, words, slots, starts)[:, 0].equal(wanted)


def test_bits_are_packed_as_the_kernels_read_them():
    bits = torch.rand(2, 5, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    assert packed(bits, 3).equal(pack(bits))
