"""PyTorch's FlexAttention: with its default options, and with the fastest of a few, timed on the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.timing import event_times

NAME = "FlexAttention"
TRIED: tuple[dict, ...] = (
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 3},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
)
TRIED_BACKWARD: tuple[dict, ...] = tuple(
    {
        "bwd_BLOCK_M1": m,
        "bwd_BLOCK_N1": n,
        "bwd_BLOCK_M2": n,
        "bwd_BLOCK_N2": m,
        "bwd_num_warps": warps,
        "bwd_num_stages": 3,
    }
    for m, n, warps in ((64, 128, 8), (64, 64, 4), (32, 128, 8))
)
"""Options that do well on data-centre GPUs, forward and backward; the default is tried too."""
_best: dict[bool, dict | None] = {}


def why_not(device: str) -> str | None:
    return None if device == "cuda" else "compared on a GPU: on a CPU its forward needs a compiler and has no backward"


def block_mask(end: Tensor, rows: int, first: Tensor | None = None) -> BlockMask:
    """Row i sees the keys below end[i], and with `first` none below first[i]."""

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < end[i] if first is None else (j >= first[i]) & (j < end[i])

    return create_block_mask(within, None, None, rows, rows, device=end.device)


def attention(options: Any = None) -> Callable[..., Tensor]:
    """attend(q, k, v, mask), compiled on a GPU, with these options of its kernels: q [B, Hq, N, D], k and v
    [B, Hkv, S, D], mask from block_mask."""
    # every shape and every set of options is a compilation of the same function; past the limit it would run unfused
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        run = compiled if q.is_cuda else flex_attention
        return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)

    return attend


def tuned(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backward: bool) -> Callable[..., Tensor]:
    """attention with the options that were fastest on the first call of its kind; later calls take the same."""
    if backward not in _best:
        up, seconds = torch.randn_like(q), {}
        for number, options in enumerate((None, *(TRIED_BACKWARD if backward else TRIED))):
            attend = attention(options)
            try:
                if backward:
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    run: Callable = partial(torch.autograd.grad, attend(*leaves, mask), leaves, up, retain_graph=True)
                else:
                    run = partial(attend, q, k, v, mask)
                seconds[number] = event_times(run, [()], 0.1).median().item()
            except Exception as error:  # tiles that do not fit this GPU
                print(f"  FlexAttention cannot use {options}: {type(error).__name__}")
        best = min(seconds, key=lambda number: seconds[number])
        _best[backward] = (None, *(TRIED_BACKWARD if backward else TRIED))[best]
    return attention(_best[backward])
