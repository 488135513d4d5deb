"""Weights in int8: a matrix with a scale for each group of a row, and a linear layer of one, by `int8_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import beagle_kernels  # noqa: F401  # the op

GROUP = 64
LEAST_GROUP = 32
"""Groups are multiples of it."""


@dataclass(frozen=True)
class Int8Matrix:
    """integers [N, K] int8 times the scales [N, K / G] float32 of their groups: a weight as `linear` takes it."""

    integers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor, group: int = GROUP) -> Int8Matrix:
        """The nearest to weight [N, K], G = group: the largest of a group becomes 127 or -127, halves go to even."""
        groups = weight.detach().float().unflatten(1, (-1, group))
        scales = groups.abs().amax(-1) / 127
        integers = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-127, 127)
        return cls(integers.to(torch.int8).flatten(1), scales)

    def __len__(self) -> int:
        return len(self.integers)

    def __getitem__(self, rows: Tensor | slice) -> Int8Matrix:
        return Int8Matrix(self.integers[rows], self.scales[rows])

    def __mul__(self, factor: float) -> Int8Matrix:
        return Int8Matrix(self.integers, self.scales * factor)

    @property
    def device(self) -> torch.device:
        return self.integers.device

    def floats(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] itself, new memory."""
        groups = self.integers.unflatten(1, (self.scales.shape[1], -1))
        return (groups * self.scales[..., None]).flatten(1).to(dtype)

    def times(self, x: Tensor) -> Tensor:
        """x [..., K] times the matrix, [..., N] in x's dtype; a gradient goes to x as through `floats`."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Times.apply(x, self.integers, self.scales)
        return torch.ops.beagle.int8_linear.default(x, self.integers, self.scales, "auto")


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(integers, scales)
        return torch.ops.beagle.int8_linear.default(x, integers, scales, "auto")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ Int8Matrix(*ctx.saved_tensors).floats(grads[0].dtype), None, None


class Int8Linear(nn.Module):
    """A linear layer with a weight in int8, whatever the number of rows: buffers `weight` [N, K] int8 and `scales`
    [N, K / G], which stay in float32 whatever the model is cast to; `bias` [N] or None."""

    weight: Tensor
    scales: Tensor

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = matrix.integers.shape
        self.group = self.in_features // matrix.scales.shape[1]
        self.register_buffer("weight", matrix.integers)
        self.register_buffer("scales", matrix.scales)
        self.bias = bias

    @property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.weight, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        out = self.matrix.times(x)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"
        return f"{sizes}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        kept = self.scales
        super()._apply(fn, recurse)
        if not self.scales.is_meta:
            self.scales = kept.to(self.scales.device)
        return self
