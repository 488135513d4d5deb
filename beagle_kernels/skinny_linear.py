"""A linear layer on few rows: y = x W^T with W as nn.Linear stores it, read once and where it lies.

    y[m, n] = sum_k x[m, k] weight[n, k], in fp32 or better, rounded once to x's dtype

On the CPU the order of the sum depends on K alone: a row's result is bit for bit the same whatever rows come with it,
wherever it stands and however many threads work. Verifying many tokens at once then rounds as decoding one at a time
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks


def skinny_linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """F.linear(x, weight) for few rows, where reading the weight is what costs (docs/design.md: A round of decoding).

    x [..., K] and weight [N, K] of one dtype, float32, float16 or bfloat16, or x in float32 and the weight in bfloat16
    (then the result is that of the same numbers in float32), any strides (a weight whose rows are not contiguous is
    copied). Returns [..., N] in x's dtype. The "cpu" backend works at any number of rows, but from some
    32 on a library's product is as fast; a GPU is served by the reference, PyTorch's own product. Not differentiable:
    for decoding only (the gradient to x would be dy W).

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "skinny_linear"
    checks.tensor(op, "weight", weight, (None, None), checks.LOGITS)
    leading = x.shape[:-1] if isinstance(x, Tensor) else ()
    dtypes = (weight.dtype,) if weight.dtype != torch.bfloat16 else (torch.bfloat16, torch.float32)
    checks.tensor(op, "x", x, (*leading, weight.shape[1]), dtypes)
    checks.same_device(op, x=x, weight=weight)
    return torch.ops.beagle.skinny_linear(x, weight, backend)


@backends.operator("skinny_linear")
def _op(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    return backends.call("skinny_linear", backend, x.device, x, weight)


@_op.register_fake
def _(x, weight, backend="auto"):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
