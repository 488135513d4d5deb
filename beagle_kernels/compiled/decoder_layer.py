"""`decoder_layer` by the compiled executor of the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import implementation
from ..extension import _C, DTYPES, address, contiguous, dense, kind_of, missing_cpu

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_NO_LINEAR = (0, 0, 0, 0, 0, 0)


@implementation("decoder_layer", "cpu", missing_cpu)
def decoder_layer(
    x: Tensor,
    weights: Sequence[Tensor | None],
    numbers: Sequence[float],
    activation: str,
    residual: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    starts: Tensor | None,
    scale: float,
    softcap: float | None,
    write: int,
    keys_of_output: bool,
) -> Tensor:
    x, cos, sin, lengths, mask = (tensor.contiguous() for tensor in (x, cos, sin, lengths, mask))
    block_table, starts = contiguous(block_table), contiguous(starts)
    weights = [*(weight if weight is None else dense(weight) for weight in weights[:7]), *map(contiguous, weights[7:])]
    batch, nodes, width = x.shape
    out = torch.empty_like(x)
    key_heads, slots, head = keys.shape[1:]
    planes = [plane if plane.stride(3) == 1 else plane.contiguous() for plane in (keys, values)]
    linears: list[int] = []
    for weight, bias in zip(weights[:7], weights[7:14]):
        linears += _NO_LINEAR if weight is None else _linear(weight, bias, x.dtype)
    norms: list[float] = []
    for weight, eps, added in zip(weights[14:], numbers[:8], numbers[8:]):
        norms += address(weight), eps, added
    _C.cpu.decoder_layer(
        torch.get_num_threads(),
        x.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        batch,
        nodes,
        width,
        weights[0].shape[0] // head,  # type: ignore[union-attr]
        key_heads,
        head,
        cos.shape[2],
        *linears,
        *norms,
        _ACTIVATIONS[activation],
        residual,
        scale,
        softcap or 0.0,
        cos.data_ptr(),
        sin.data_ptr(),
        *_plane(planes[0]),
        *_plane(planes[1]),
        slots,
        address(block_table),
        0 if block_table is None else block_table.shape[1],
        keys.shape[0],
        lengths.data_ptr(),
        mask.data_ptr(),
        mask.shape[2],
        address(starts),
        write,
        keys_of_output,
    )
    for given, plane in zip((keys, values), planes):
        if plane is not given:
            given.copy_(plane)
    return out


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[int, ...]:
    outputs, width = weight.shape
    return weight.data_ptr(), address(bias), kind_of(weight, dtype), outputs, width, weight.stride(0)


def _plane(plane: Tensor) -> tuple[int, ...]:
    return plane.data_ptr(), *plane.stride()[:3]
