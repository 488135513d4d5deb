"""A linear layer on few rows with a weight in int8: a byte is read where fp32 reads four.

Of K columns each G in turn are a group. A row x is quantised by groups as it comes: with a = max |x| over the group,

    s = a / 127,    q[k] = round(x[k] * (127 / a))    in fp32, ties to even

and with the weight's integers and scales

    y[n] = sum_g (sum_k q[k] weight[n, k]) * (s[g] * scales[n, g])

The inner sum is exact and rounded once to fp32; the products with the scales and the sum over the groups, in order, are
fp32's, not fused. So every backend gives the same bits, and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks

GROUP = 32
"""Groups are multiples of it."""


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, *, backend: str = "auto") -> Tensor:
    """x times a quantised weight, [..., K] -> [..., N] in x's dtype; near F.linear(x, weight.float() * scales of each).

    x [..., K] float32, float16 or bfloat16, any strides; weight [N, K] int8 (one whose rows are not contiguous is
    copied); scales [N, K / G] float32, G a multiple of 32. A group of x whose largest magnitude is below 2^-100 counts
    as zeros; one with an infinity or a NaN makes its row's results NaN. Not differentiable.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "int8_linear"
    checks.tensor(op, "weight", weight, (None, None), (torch.int8,))
    checks.tensor(op, "scales", scales, (weight.shape[0], None), checks.FLOAT32)
    leading = x.shape[:-1] if isinstance(x, Tensor) else ()
    checks.tensor(op, "x", x, (*leading, weight.shape[1]), checks.LOGITS)
    check_groups(op, weight.shape[1], scales.shape[1])
    checks.same_device(op, x=x, weight=weight, scales=scales)
    return torch.ops.beagle.int8_linear(x, weight, scales, backend)


def check_groups(op: str, width: int, groups: int) -> None:
    """Check that so many scales a row belong to groups that the ops take."""
    if width % max(groups * GROUP, 1) or (width and not groups):
        raise ValueError(
            f"{op}: weight has {width} columns and scales has {groups}; allowed: one scale for each G columns of a "
            f"row, G a multiple of {GROUP} that divides them"
        )


@backends.operator("int8_linear")
def _op(x: Tensor, weight: Tensor, scales: Tensor, backend: str = "auto") -> Tensor:
    return backends.call("int8_linear", backend, x.device, x, weight, scales)


@_op.register_fake
def _(x, weight, scales, backend="auto"):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
