"""`adjust_logits` by the compiled executors: room for what is counted of each row's text, and the addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..extension import (
    _C,
    DTYPES,
    address,
    addresses,
    allow,
    chunks_of,
    contiguous,
    dense,
    executor,
    flat,
    missing_cpu,
    missing_cuda,
)


@implementation("adjust_logits", "cuda", missing_cuda, float64=False)
@implementation("adjust_logits", "cpu", missing_cpu, float64=False)
def adjust_logits(
    logits: Tensor,
    paths: Tensor,
    text: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    added: Tensor | None,
    first: Tensor | None,
    phrases: Tensor,
    phrase_bias: Tensor,
    phrase_rows: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    ngram: Tensor,
    token_ids: Tensor | None,
    allowed: Tensor | None,
) -> Tensor:
    (batch, nodes, width), device = logits.shape, logits.device
    out = torch.empty(batch, nodes, width, dtype=torch.float32, device=device)
    if not out.numel():
        return out
    allow("adjust_logits", "the number of rows", batch, _C.max_rows, device)
    logits, (slots, room) = dense(logits), (text.shape[1], paths.shape[2])
    added, first, token_ids, allowed = map(contiguous, (added, first, token_ids, allowed))
    vocab = next((table.shape[1] for table in (added, first) if table is not None), width)
    # one CUDA's alone: the host has a table of its own, which it need not clear; then how many are listed
    zeros = torch.zeros(batch * (width + 1) if logits.is_cuda else batch, dtype=torch.int32, device=device)
    # the columns of each text's different tokens, and of the paths' tokens
    columns = torch.empty(batch * (slots + nodes * room), dtype=torch.int32, device=device)
    kept, (path, texts, length, prompt, *given) = flat(
        paths, text, lengths, prompts, phrases, phrase_bias, phrase_rows, repetition, frequency, presence, ngram
    )
    with executor(device) as (module, where):
        module.adjust_logits(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            batch,
            nodes,
            width,
            logits.stride(0),
            logits.stride(1),
            path,
            room,
            texts,
            slots,
            length,
            prompt,
            address(added),
            address(first),
            vocab,
            *given[:3],
            *phrases.shape,
            *given[3:],
            address(token_ids),
            address(allowed),
            0 if allowed is None else allowed.shape[2],
            chunks_of(batch * nodes if logits.is_cuda else nodes, width, device),
            zeros.data_ptr() + 4 * batch,
            *addresses((zeros, columns)),
            columns.data_ptr() + 4 * batch * slots,
            out.data_ptr(),
        )
    return out
