"""`build_tree` by the compiled executors: a row a team."""

from __future__ import annotations

from torch import Tensor

from ..extension import compiled, executor, flat


@compiled("build_tree")
def build_tree(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, num_nodes: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, candidates = tokens.shape
    words = (num_nodes + 63) // 64
    out_tokens, mask = root.new_empty(batch, num_nodes), root.new_empty(batch, num_nodes, words)
    out_parents, depth = parents.new_empty(batch, num_nodes), parents.new_empty(batch, num_nodes)
    size, label = parents.new_empty(batch), parents.new_empty(batch * candidates)
    kept, inputs = flat(root, tokens, scores, parents)
    with executor(root.device) as (module, where):
        module.build_tree(
            where,
            *inputs,
            batch,
            candidates,
            num_nodes,
            words,
            max_depth,
            label.data_ptr(),
            out_tokens.data_ptr(),
            out_parents.data_ptr(),
            depth.data_ptr(),
            mask.data_ptr(),
            size.data_ptr(),
        )
    return out_tokens, out_parents, depth, mask, size
