"""What training computes on at once: packed sequences with the target's states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Packed sequences with the target's states.

    tokens [T] int64; states [T, d]; loss_mask [T] bool, set where the next token is the assistant's;
    cu_seqlens [num_seqs + 1] int32; positions [T] int64, within each sequence.
    """

    tokens: Tensor
    states: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    positions: Tensor

    @property
    def sequence(self) -> Tensor:
        """[T] int64: the sequence that each token belongs to."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        each = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(each, lengths, output_size=len(self.tokens))

    def to(self, device: torch.device) -> Batch:
        """All parts on `device`; from pinned memory without waiting."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))
