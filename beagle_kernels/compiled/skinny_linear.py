"""`skinny_linear` by the compiled executor of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..extension import _C, DTYPES, dense, kind_of, missing_cpu


@implementation("skinny_linear", "cpu", missing_cpu)
def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    outputs, width = weight.shape
    rows = x.reshape(-1, width) if width else x.new_empty(x.shape[:-1].numel(), 0)
    rows, weight = dense(rows), dense(weight)
    out = x.new_empty(*x.shape[:-1], outputs)
    _C.cpu.skinny_linear(
        torch.get_num_threads(),
        rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        kind_of(weight, x.dtype),
        len(rows),
        outputs,
        width,
        rows.stride(0),
        weight.stride(0),
    )
    return out
