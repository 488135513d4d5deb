"""PyTorch's scaled_dot_product_attention: its own choice of kernel, or one backend and no other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NAME = "PyTorch SDPA"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def why_not(device: str) -> str | None:
    return None


def attention(backend: str | None = None) -> Callable[..., Tensor]:
    """attend(q, k, v, mask=None, causal=False): q [B, Hq, N, D], k and v [B, Hkv, S, D], mask bool [.., N, S].

    It raises where the backend cannot serve the call. Key heads are expanded for backends without grouped queries.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]) if backend else nullcontext():
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)

    return attend


def expanded(*tensors: Tensor, group: int) -> list[Tensor]:
    """Key heads repeated for their query heads: no fused kernel takes both a mask and shared key heads."""
    return [x.repeat_interleave(group, 1) for x in tensors]
