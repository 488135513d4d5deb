"""Linear layers in decoding: few rows on a CPU go through `skinny_linear`, where no row depends on those beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_kernels import Linear, backends
from beagle_kernels.extension import multiplies_bf16
from beagle_sd.models.layers.halved import halved_weight
from beagle_sd.models.layers.int8 import Int8Linear, Int8Matrix

MOST_ROWS = {torch.float32: 32, torch.bfloat16: 32 if multiplies_bf16() else 8}
"""Rows up to which skinny_linear serves: from there on a library's blocked product is as fast or faster. In bfloat16
few, where each row costs a weight that is widened to be multiplied."""


def linear(x: Tensor, weight: Tensor | Int8Matrix, bias: Tensor | None = None, half: Tensor | None = None) -> Tensor:
    """F.linear for inference: by skinny_linear where x [..., K] has few rows on a CPU, by int8_linear with a weight in
    int8; half: the same weight in bf16 (halved.py), which is then read for few rows."""
    if isinstance(weight, Int8Matrix):
        out = weight.times(x)
        return out if bias is None else out + bias
    if x.dtype != weight.dtype or not few_rows(x):
        return F.linear(x, weight, bias)
    # the op itself: the public function's checks would cost a small model a percent
    out = torch.ops.beagle.skinny_linear.default(x, weight if half is None else half, "cpu")
    return out if bias is None else out.add_(bias)


def few_rows(x: Tensor, most: int | None = None) -> bool:
    """Whether x [..., K] is what the CPU's ops for few rows serve: inference, in its own dtype, up to `most` rows."""
    return (
        0 < x.shape[:-1].numel() <= (MOST_ROWS.get(x.dtype, 0) if most is None else most)
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and served()
    )


@functools.cache
def served() -> bool:
    """Whether the extension is there, whose executor has the ops of few rows."""
    return backends.why_not("skinny_linear", "cpu", torch.device("cpu")) is None


def few_rows_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for the module by `linear`, calls that record gradients excepted; None unless it is a nn.Linear on a
    CPU, its forward nobody's (an offloading hook's, an adapter's), its weight dense."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or not served():
        return None
    weight = module.weight
    plain = (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in MOST_ROWS
        and weight.layout == torch.strided
        and weight.stride(-1) == 1
    )
    return functools.partial(_forward, module, halved_weight(module)) if plain else None


def parts_of(module: nn.Module) -> Linear | None:
    """What decoding reads of a view's or a draft's linear layer for few rows; None of one that is none of ours."""
    if isinstance(module, Int8Linear):
        return Linear(module.weight, module.bias, module.scales)
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func is _forward and forward.args[0] is module:
        half = forward.args[1]
    elif isinstance(module, FewRowsLinear) and forward is None:
        half = halved_weight(module)
    else:
        return None
    return Linear(module.weight if half is None else half, module.bias)


def _forward(module: nn.Linear, half: Tensor | None, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias, half)


class FewRowsLinear(nn.Linear):
    """nn.Linear whose forward is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, halved_weight(self))
