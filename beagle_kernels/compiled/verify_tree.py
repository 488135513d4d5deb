"""`verify_tree` by the compiled executors: on a GPU a choice at every node, then the walk; on the host at once."""

from __future__ import annotations

from torch import Tensor

from ..accept_tree import empty_verdict
from ..extension import _C, DTYPES, address, addresses, allow, chunks_of, compiled, dense, executor, flat, group_room


@compiled("verify_tree")
def verify_tree(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    depth: Tensor,
    mask: Tensor,
    size: Tensor,
    max_depth: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, nodes), vocab = tokens.shape, logits.shape[2]
    allow("verify_tree", "the number of rows", batch, _C.max_rows, logits.device)
    logits, verdict = dense(logits), empty_verdict(tokens, size, max_depth)
    # on the host a row's tree is walked level by level, most often a node at a time
    chunks = chunks_of(batch * nodes if logits.is_cuda else batch, vocab, logits.device)
    # one workspace: the keys, then the flags
    rows = batch * nodes * chunks
    keys, groups = tokens.new_empty(rows + (rows + 1) // 2), group_room(logits, batch * nodes, chunks)
    kept, (at, *given) = flat(positions, tokens, parents, depth, mask, size, seed, temperature, top_k, top_p, min_p)
    tree, settings = (*given[:5], nodes, mask.shape[2], max_depth), given[5:]
    with executor(logits.device) as (module, where):
        module.verify_tree(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            batch,
            vocab,
            logits.stride(0),
            logits.stride(1),
            *tree,
            at,
            *settings,
            keys.data_ptr(),
            keys.data_ptr() + 8 * rows,
            address(groups),
            chunks,
            *addresses(verdict),
        )
    return verdict
