"""The definition of `skinny_linear`: a matrix product in fp32 or better."""

from __future__ import annotations

from torch import Tensor

from ..backends import implementation
from ..types import accumulation


@implementation("skinny_linear", "reference")
def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    acc = accumulation(x.dtype)
    return (x.to(acc) @ weight.to(acc).T).to(x.dtype)
