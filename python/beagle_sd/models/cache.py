"""The target's key-value cache in fixed buffers, dense or in pages: ragged rows, tree nodes at the end of each."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from beagle_sd.models.head import UnsupportedTarget


class TreeCache(Cache):
    """One tensor `states` for all layers, keys before values; `lengths` [B] int32; `offsets` [B] int64, what the
    position of a row's next token is beside its length: not 0 only behind pictures (pictures.py).

    states is [layers, 2, B, Hkv, S, D] or, with page_size, pages [layers, 2, P, Hkv, page, D] of which row b's slot s
    is in page block_table[b, s // page]. Slot j of row b holds position j for j < lengths[b]; a forward over N new
    tokens writes slots lengths[b] .. lengths[b] + N - 1 and leaves `lengths` as they are: the caller says what was
    accepted. `fixed`: a forward reads nothing on the host, and its shapes follow from N alone (so on a GPU, and with
    pages); else the longest row bounds what it reads.
    """

    block_table: Tensor | None = None
    attended = False

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        width: int,
        dtype,
        device,
        *,
        page_size: int | None = None,
        fixed: bool = False,
    ):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.offsets = torch.zeros(batch, dtype=torch.int64, device=device)
        self.fixed = fixed or page_size is not None or self.lengths.is_cuda
        self.capacity, self.page_size = 0, page_size
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size is {page_size}; allowed: 1 or more slots")
        rows, size = (batch, 0) if page_size is None else (0, page_size)
        self.states = torch.zeros(layers, 2, rows, heads, size, width, dtype=dtype, device=device)
        self.reserve(slots)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._at: tuple[Tensor, Tensor] = (self._rows, self._rows)
        self._starts: list[int] = []
        self._limit: int | None = None

    def reserve(self, slots: int) -> None:
        """Make room for `slots` positions a row at least, behind what is there: `states` and `block_table` may move."""
        if slots <= self.capacity:
            return
        self.capacity = slots
        if self.page_size is None:
            self.states = grown(self.states, 4, slots)
            return
        batch, pages = len(self.lengths), -(-slots // self.page_size)
        self.states = grown(self.states, 2, batch * pages)
        pages_of = torch.arange(batch * pages, dtype=torch.int32, device=self.lengths.device).view(pages, batch)
        self.block_table = pages_of.T.contiguous()

    def row(self, row: int) -> TreeCache:
        """One row of a dense cache as a cache of its own, in the same memory, until `reserve` moves it."""
        one = copy(self)
        one.states, one.lengths, one._rows = (
            self.states[:, :, row : row + 1],
            self.lengths[row : row + 1],
            self._rows[:1],
        )
        one.offsets = self.offsets[row : row + 1]
        return one

    def expect(self, count: int, limit: int | None) -> None:
        """Prepare for a forward over `count` new tokens a row, which is to be given `limit` slots (None: all)."""
        if (limit or count) > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots a row; {limit or count} are needed")
        self._limit = limit
        if not self.fixed:
            self._starts = self.lengths.tolist()
            return
        slots = self.lengths.long()[:, None] + torch.arange(count, device=self.lengths.device)
        self._at = self._rows, slots
        if self.block_table is not None:
            size = self.states.shape[4]
            self._at = self.block_table.gather(1, slots // size).long(), slots % size

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write [B, Hkv, N, D] new keys and values; return the layer's first `limit` slots, or all its pages."""
        keys, values = self.states[layer_idx]
        for name, new, buffer in (("keys", key_states, keys), ("values", value_states, values)):
            if (new.shape[1], new.shape[3]) != (buffer.shape[1], buffer.shape[3]):
                raise UnsupportedTarget(
                    f"layer {layer_idx} gives {new.shape[1]} heads of {new.shape[3]} {name}; allowed: "
                    f"{buffer.shape[1]} of {buffer.shape[3]}, as the target's config has it"
                )
        if self.fixed:
            rows, slots = self._at
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        else:  # index_put_ would wake PyTorch's threads, which then spin where a CPU's linear layers want to run
            for row, start in enumerate(self._starts):
                end = start + key_states.shape[2]
                keys[row, :, start:end], values[row, :, start:end] = key_states[row], value_states[row]
        if self._limit is None:
            return keys, values
        return keys[:, :, : self._limit], values[:, :, : self._limit]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's length; where the host must not ask the device, what bounds it."""
        return self.capacity if self.fixed else int(self.lengths.max())


def grown(values: Tensor, dim: int, size: int) -> Tensor:
    """The values, followed by zeros up to `size` along `dim`."""
    shape = list(values.shape)
    shape[dim] = size - shape[dim]
    more = values.new_zeros(shape)
    return torch.cat((values, more), dim) if values.numel() else more


def visible_keys(lengths: Tensor, mask: Tensor, limit: int) -> Tensor:
    """The 4-D mask [B, 1, N, limit] of N new tokens: every slot below lengths[b], then by mask words [B, N, W]."""
    count = mask.shape[1]
    node = torch.arange(count, device=mask.device)
    among = (mask[:, :, node // 64] >> (node % 64) & 1).bool()
    slots = torch.arange(limit, device=lengths.device)
    lengths = lengths.long()[:, None]
    new = (slots - lengths).clamp(0, count - 1)
    new = torch.gather(among, 2, new[:, None].expand(-1, count, -1))
    inside = (slots >= lengths) & (slots < lengths + count)
    return ((slots < lengths)[:, None] | (new & inside[:, None]))[:, None]


def causal(batch: int, count: int, device: torch.device) -> Tensor:
    """Mask words [B, N, W] int64: each of N new tokens sees itself and those before it."""
    node = torch.arange(count, device=device)
    ones = node[:, None] + 1 - 64 * node[: (count + 63) // 64]
    words = torch.where(ones >= 64, -1, (1 << ones.clamp(0, 63)) - 1)
    return words.expand(batch, -1, -1)
