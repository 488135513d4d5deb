"""`perturb_logits` by the compiled executors: what the filters keep of each row, then the values, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import DTYPES, address, chunks_of, compiled, dense, executor, flat, group_room


@compiled("perturb_logits")
def perturb_logits(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    logits, positions = dense(logits), positions.contiguous()
    values = logits.new_empty(rows, vocab, dtype=torch.float32)
    status = torch.empty_like(positions, dtype=torch.int32)
    if rows == 0:
        return values, status
    chunks = chunks_of(rows, vocab, logits.device)
    keys, flags = positions.new_empty(rows * chunks), status.new_empty(rows * chunks)
    groups, bounds = group_room(logits, rows, chunks), values.new_empty(rows, 2)
    kept, settings = flat(seed, temperature, top_k, top_p, min_p)
    with executor(logits.device) as (module, where):
        module.perturb_logits(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            positions.data_ptr(),
            *settings,
            keys.data_ptr(),
            flags.data_ptr(),
            address(groups),
            bounds.data_ptr(),
            chunks,
            values.data_ptr(),
            status.data_ptr(),
        )
    return values, status
