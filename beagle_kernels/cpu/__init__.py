"""Faster than the reference on CPU tensors: the same ops in blocks that fit the caches, on PyTorch's own kernels."""

from __future__ import annotations

import torch

from ..backends import probe
from . import block_attention, distill_loss, extend_attention, tree_attention

__all__ = [
    "block_attention",
    "distill_loss",
    "extend_attention",
    "tree_attention",
]


@probe("cpu")
def why_not(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it takes CPU tensors"
