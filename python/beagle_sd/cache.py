"""The target's key-value cache in fixed buffers: ragged rows, tree nodes at the end of each."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class TreeCache(Cache):
    """One tensor `states` [layers, 2, B, Hkv, S, D] for all layers, keys before values; `lengths` [B] int32.

    Slot j of row b holds position j for j < lengths[b]; a forward over N new tokens writes slots
    lengths[b] .. lengths[b] + N - 1 and leaves `lengths` as they are: the caller says what was accepted.
    """

    def __init__(self, layers: int, batch: int, heads: int, slots: int, width: int, dtype, device):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.states = torch.zeros(layers, 2, batch, heads, slots, width, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._slots: Tensor | None = None
        self._limit = 0

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.states.shape[4]

    def expect(self, count: int, limit: int) -> None:
        """Prepare for a forward over `count` new tokens a row, whose masks are `limit` keys wide."""
        if limit > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots a row; {limit} are needed")
        self._slots = self.lengths.long()[:, None] + torch.arange(count, device=self.lengths.device)
        self._limit = limit

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write [B, Hkv, N, D] new keys and values; return the layer's first `limit` slots."""
        keys, values = self.states[layer_idx]
        for name, new, buffer in (("keys", key_states, keys), ("values", value_states, values)):
            if (new.shape[1], new.shape[3]) != (buffer.shape[1], buffer.shape[3]):
                raise ValueError(f"layer {layer_idx} gives {new.shape[1]} heads of {new.shape[3]} {name}; allowed: "
                                 f"{buffer.shape[1]} of {buffer.shape[3]}, as the target's config has it")
        keys[self._rows, :, self._slots] = key_states.transpose(1, 2)
        values[self._rows, :, self._slots] = value_states.transpose(1, 2)
        return keys[:, :, : self._limit], values[:, :, : self._limit]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's length."""
        return int(self.lengths.max())


def visible_keys(lengths: Tensor, among: Tensor, limit: int) -> Tensor:
    """The 4-D mask [B, 1, N, limit] of N new tokens: every slot below lengths[b], then `among` [B, N, N] bool."""
    slots = torch.arange(limit, device=lengths.device)
    lengths = lengths.long()[:, None]
    own = (slots - lengths).clamp(0, among.shape[-1] - 1)
    own = torch.gather(among, 2, own[:, None].expand(-1, among.shape[1], -1))
    inside = (slots >= lengths) & (slots < lengths + among.shape[-1])
    return ((slots < lengths)[:, None] | (own & inside[:, None]))[:, None]


def causal(batch: int, count: int, device: torch.device) -> Tensor:
    """[B, N, N] bool: each new token sees itself and those before it."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
