"""`int8_linear` by the compiled executor of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..extension import _C, DTYPES, dense, missing_cpu


@implementation("int8_linear", "cpu", missing_cpu)
def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    outputs, width = weight.shape
    rows = x.reshape(-1, width) if width else x.new_empty(x.shape[:-1].numel(), 0)
    rows, weight, scales = dense(rows), dense(weight), scales.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    _C.cpu.int8_linear(
        torch.get_num_threads(),
        rows.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        len(rows),
        outputs,
        width,
        width // scales.shape[1] if width else 32,
        rows.stride(0),
        weight.stride(0),
    )
    return out
