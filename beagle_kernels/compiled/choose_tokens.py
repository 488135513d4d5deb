"""`choose_tokens` by the compiled executors: keys of chunks of each row, then the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import DTYPES, address, chunks_of, compiled, contiguous, dense, executor, flat, group_room


@compiled("choose_tokens")
def choose_tokens(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: int = 0,
    rounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    logits, positions, rounds = dense(logits), positions.contiguous(), contiguous(rounds)
    tokens, status = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)
    if rows == 0:
        return tokens, status
    chunks = chunks_of(rows, vocab, logits.device)
    keys, flags = positions.new_empty(rows * chunks), status.new_empty(rows * chunks)
    groups = group_room(logits, rows, chunks)
    kept, settings = flat(seed, temperature, top_k, top_p, min_p)
    with executor(logits.device) as (module, where):
        module.choose_tokens(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            positions.data_ptr(),
            *settings,
            stream,
            address(rounds),
            keys.data_ptr(),
            flags.data_ptr(),
            address(groups),
            chunks,
            tokens.data_ptr(),
            status.data_ptr(),
        )
    return tokens, status
