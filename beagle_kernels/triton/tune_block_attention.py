"""Tiles for `block_attention` found by trying them, on request."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_attention import block_attention
from .block_attention_backward import block_attention_backward
from .configs import Config, architecture, tune
from .tiles import block_d


def tune_block_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, offset: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Config]:
    """On request: find the fastest tiles for calls like this one, forward and backward, and use them from here on."""
    args = offset, cu_seqlens, window, q.shape[-1] ** -0.5
    out, lse = block_attention(q, k, v, *args)
    key = architecture(q.device), block_d(q.shape[-1]), q.dtype
    forward, backward = lambda: block_attention(q, k, v, *args), lambda: block_attention_backward(*grads, *args)
    grads = torch.randn_like(out), None, q, k, v, out, lse
    runs = {"block_forward": forward, "block_dq": backward, "block_dkv": backward}
    return {kernel: tune(kernel, *key, run) for kernel, run in runs.items()}
