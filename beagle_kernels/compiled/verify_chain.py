"""`verify_chain` by the compiled executors: laws of rows, then the chain, with both in workspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..accept_tree import empty_verdict
from ..extension import (
    _C,
    DTYPES,
    address,
    addresses,
    allow,
    chunks_of,
    compiled,
    contiguous,
    dense,
    executor,
    flat,
    group_room,
)


@compiled("verify_chain")
def verify_chain(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_tokens: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    rule: str = "token",
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, steps), vocab = draft_tokens.shape, target_logits.shape[2]
    allow("verify_chain", "the number of rows", batch, _C.max_rows, target_logits.device)
    if target_logits.dtype != draft_logits.dtype:
        target_logits, draft_logits = target_logits.float(), draft_logits.float()
    target, draft, token_ids = dense(target_logits), dense(draft_logits), contiguous(token_ids)
    verdict = empty_verdict(draft_tokens, top_k, steps)
    laws = torch.empty(batch * (2 * steps + 1) * _C.law_size, dtype=torch.uint8, device=target.device)
    chunks, groups, parts = 0, None, None
    if target.is_cuda:
        rows = batch * (2 * steps + 1)
        chunks = chunks_of(rows, max(vocab, draft.shape[2]), target.device)
        groups, parts = group_room(target, rows, chunks), draft_tokens.new_empty(rows * chunks * _C.part_words)
    kept, (drafted, at, *settings) = flat(draft_tokens, positions, seed, temperature, top_k, top_p, min_p)
    strides = (*target.stride()[:2], *draft.stride()[:2])
    with executor(target.device) as (module, where):
        module.verify_chain(
            where,
            target.data_ptr(),
            draft.data_ptr(),
            DTYPES[target.dtype],
            batch,
            steps,
            vocab,
            draft.shape[2],
            *strides,
            drafted,
            at,
            *settings,
            rule == "block",
            address(token_ids),
            laws.data_ptr(),
            address(groups),
            address(parts),
            chunks,
            *addresses(verdict),
        )
    return verdict
