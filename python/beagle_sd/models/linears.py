"""Linear layers in decoding: few rows on a CPU go through `skinny_linear`, where no row depends on those beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_kernels import backends
from beagle_sd.models.temporary import TemporaryChange

MOST_ROWS = {torch.float32: 32, torch.bfloat16: 8}
"""Rows up to which skinny_linear serves: from there on a library's blocked product is as fast or faster."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for inference: by skinny_linear where x [..., K] has few rows on a CPU."""
    rows = x.shape[:-1].numel()
    if not (
        0 < rows <= MOST_ROWS.get(weight.dtype, 0)
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _served()
    ):
        return F.linear(x, weight, bias)
    # the op itself: the public function's checks would cost a small model a percent
    out = torch.ops.beagle.skinny_linear.default(x, weight, "cpu")
    return out if bias is None else out.add_(bias)


@functools.cache
def _served() -> bool:
    return backends.why_not("skinny_linear", "cpu", torch.device("cpu")) is None


def _plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is nn.Linear itself, its forward nobody's (an offloading hook's, an adapter's), its weight dense."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in MOST_ROWS
        and weight.layout == torch.strided
        and weight.stride(-1) == 1
    )


def _redirect(model: nn.Module) -> list[nn.Linear]:
    changed = [module for module in model.modules() if _plain(module)]
    for module in changed:
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]
    return changed


def _restore(model: nn.Module, changed: list[nn.Linear]) -> None:
    for module in changed:
        module.__dict__.pop("forward", None)


_redirected = TemporaryChange(_redirect, _restore)


@contextmanager
def skinny_linears_of(*models: nn.Module | None) -> Iterator[None]:
    """Let the models' plain linear layers on the CPU go through `linear` inside the block, calls that record
    gradients excepted; they are as before when the last thread has left."""
    with ExitStack() as entered:
        for model in models:
            if model is not None and _served():
                entered.enter_context(_redirected(model))
        yield


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
