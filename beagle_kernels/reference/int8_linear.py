"""The definition of `int8_linear`: rows quantised group by group, exact products of a group, sums in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation

LEAST = 2.0**-100
"""Groups of x whose largest magnitude is below count as zeros."""


def quantised(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [..., K] as integers [..., K / group, group], in fp32, and their scales [..., K / group]: the largest magnitude
    of a group over 127, NaN where that is not finite."""
    x = x.float().unflatten(-1, (-1, group))
    largest = x.abs().amax(-1)
    most = torch.full_like(largest, 127.0)  # a tensor: torch divides by a number in its own ways
    usual = (largest >= LEAST) & largest.isfinite()
    scales = (largest / most).where(usual, torch.where(largest < LEAST, 0.0, torch.nan))
    return (x * (most / largest)[..., None]).round().where(usual[..., None], 0.0), scales


@implementation("int8_linear", "reference")
def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
    if not weight.shape[1]:
        return out.to(x.dtype)
    group = weight.shape[1] // scales.shape[1]
    (rows, x_scales), weights = quantised(x, group), weight.unflatten(1, (-1, group))
    for g in range(scales.shape[1]):
        products = (rows[..., g, :].double() @ weights[:, g].double().T).float()  # exact but for their last rounding
        out += products * (x_scales[..., g, None] * scales[:, g])
    return out.to(x.dtype)
