"""`top_candidates` by the compiled executors: the best of each row, by what its groups may reach."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import _C, DTYPES, address, allow, chunks_of, compiled, contiguous, dense, executor, flat, group_room


@compiled("top_candidates")
def top_candidates(
    logits: Tensor,
    k: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    logits, positions, token_ids = dense(logits), positions.contiguous(), contiguous(token_ids)
    tokens, scores = positions.new_empty(rows, k), positions.new_empty(rows, k, dtype=torch.float32)
    if rows == 0:
        return tokens, scores
    allow("top_candidates", "k", k, _C.max_k, logits.device)
    allow("top_candidates", "the number of rows", rows, _C.max_rows, logits.device)
    chunks = chunks_of(rows, vocab, logits.device) if logits.is_cuda else 1
    keys = positions.new_empty(0 if logits.is_cuda else rows * k)
    sums = scores.new_empty(rows * chunks * 2 if logits.is_cuda else 0)
    groups = group_room(logits, rows, chunks)
    kept, settings = flat(seed, temperature, top_k, top_p, min_p)
    with executor(logits.device) as (module, where):
        module.top_candidates(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            k,
            positions.data_ptr(),
            *settings,
            address(token_ids),
            keys.data_ptr(),
            sums.data_ptr(),
            address(groups),
            chunks,
            tokens.data_ptr(),
            scores.data_ptr(),
        )
    return tokens, scores
