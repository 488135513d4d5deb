"""A call of every public op, with tensors of given sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import beagle_kernels as bk
from beagle_kernels import DraftTree, Sampling

SIZES = {"R": 3, "B": 2, "N": 5, "M": 4, "V": 70, "T": 9, "H": 4, "K": 2, "D": 16, "S": 12, "L": 2, "P": 3}
Call = tuple[Callable[..., object], list[Tensor]]


def sampling_of(*fields: Tensor) -> Sampling:
    return Sampling(*fields)


def adjusted(z, paths, text, lengths, prompts, ids, allowed, *fields: Tensor, backend: str) -> Tensor:
    options = {"token_ids": ids, "allowed": allowed, "backend": backend}
    return bk.adjust_logits(z, paths, text, lengths, prompts, bk.Adjustments(*fields), **options)


def layer_of(parts: Sequence[Tensor]) -> bk.LayerWeights:
    """Seven matrices, a norm of states and one of keys."""
    return bk.LayerWeights(*map(bk.Linear, parts[:7]), norm_in=bk.Norm(parts[7], 1e-6), norm_k=bk.Norm(parts[8], 1e-6))


def calls(sizes: dict[str, int]) -> dict[str, Call]:
    """Every public op as a function of its tensors alone (and a backend), with tensors of these sizes."""
    pick = torch.Generator().manual_seed(1)
    R, B, N, M, V, T, H, K, D, S, L, P = (sizes[name] for name in "RBNMVTHKDSLP")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=pick)

    def whole(top: int, *shape: int, dtype=torch.int64) -> Tensor:
        return torch.randint(max(top, 1), shape, generator=pick, dtype=dtype)

    def knobs(rows: int) -> list[Tensor]:
        return [field[:rows] for field in Sampling.of(max(rows, 1), 5, 0.8, 20, 0.9, 0.01)]

    chain = torch.arange(N, dtype=torch.int32).expand(B, N)
    words = (N + 63) // 64
    ancestors = torch.cumsum(torch.eye(N, dtype=torch.int64), 0).sum(1) - 1
    mask = ((2 << ancestors) - 1)[None, :, None].expand(B, N, 1)[..., :words]
    tree = [whole(V, B, N), chain - 1, chain, mask, torch.full((B,), N, dtype=torch.int32)]
    cache = normal(L, 2, B, K, S, D)
    path = torch.arange(1, M + 1, dtype=torch.int32).expand(B, M) * 2
    few, one = torch.full((B,), max(M - 1, 0), dtype=torch.int32), torch.ones(B, dtype=torch.int32)
    bounds = torch.tensor([0, T // 2, T], dtype=torch.int32)
    starts = torch.tensor([1, 0], dtype=torch.int32)
    return {
        "block_attention": (
            lambda q, k, v, offset, cu, backend: bk.block_attention(q, k, v, 3, offset, cu, backend=backend),
            [normal(T, H, D), normal(T, K, D), normal(T, K, D), starts, bounds],
        ),
        "extend_attention": (
            bk.extend_attention,
            [normal(R, H, D), normal(R, H), normal(R, H, D), normal(R, M, K, D), normal(R, M, K, D)],
        ),
        "tree_attention": (
            bk.tree_attention,
            [normal(B, N, H, D), normal(B, K, S, D), normal(B, K, S, D), one * 3, whole(9, B, N, 1)],
        ),
        "tree_attention, paged": (
            lambda q, k, v, lengths, mask, table, backend: bk.tree_attention(
                q, k, v, lengths, mask, block_table=table, backend=backend
            ),
            [
                normal(B, N, H, D),
                normal(P, K, S, D),
                normal(P, K, S, D),
                one * 3,
                whole(9, B, N, 1),
                whole(P, B, 2, dtype=torch.int32),
            ],
        ),
        "tree_attention, all": (
            lambda q, k, v, lengths, mask, starts, sinks, backend: bk.tree_attention(
                q, k, v, lengths, mask, starts=starts, sinks=sinks, softcap=2.0, backend=backend
            ),
            [
                normal(B, N, H, D),
                normal(B, K, S, D),
                normal(B, K, S, D + 3),
                one * 3,
                whole(9, B, N, 1),
                whole(5, B, N, dtype=torch.int32),
                normal(H),
            ],
        ),
        "distill_loss": (bk.distill_loss, [normal(T, D), normal(T, D), normal(V, D), normal(T).abs()]),
        "choose_tokens": (
            lambda z, at, *fields, backend: bk.choose_tokens(z, at, sampling_of(*fields), backend=backend),
            [normal(R, V), whole(99, R), *knobs(R)],
        ),
        "perturb_logits": (
            lambda z, at, *fields, backend: bk.perturb_logits(z, at, sampling_of(*fields), backend=backend),
            [normal(R, V), whole(99, R), *knobs(R)],
        ),
        "adjust_logits": (
            adjusted,
            [
                *(normal(B, N, V), whole(9, B, N, P), whole(9, B, T), one * 6, one * 2),
                *(torch.arange(V) * 2, whole(2**31 - 1, B, N, (2 * V + 31) // 32, dtype=torch.int32)),
                *(normal(B, 2 * V), whole(9, B, 2 * V, dtype=torch.int32)),
                *(whole(9, K, L), normal(K), whole(B, K, dtype=torch.int32)),
                *(normal(B).exp(), normal(B), normal(B), one * 3),
            ],
        ),
        "top_candidates": (
            lambda z, at, ids, *fields, backend: bk.top_candidates(
                z, 3, at, sampling_of(*fields), token_ids=ids, backend=backend
            ),
            [normal(R, V), whole(99, R), torch.arange(V) * 2, *knobs(R)],
        ),
        "build_tree": (
            lambda *given, backend: bk.build_tree(*given, N, 4, backend=backend)[:5],
            [
                whole(V, B),
                whole(V, B, M),
                -torch.rand(B, M, generator=pick).cumsum(1),
                whole(1, B, M, dtype=torch.int32) - 1,
            ],
        ),
        "lookup": (
            lambda *given, backend: bk.lookup(*given, M, backend=backend),
            [whole(3, B, S), torch.full((B,), S, dtype=torch.int32)],
        ),
        "join_branch": (
            bk.join_branch,
            [
                whole(3, B, M),
                -torch.rand(B, M, generator=pick).cumsum(1),
                whole(1, B, M, dtype=torch.int32) - 1,
                whole(3, B, N),
                -torch.rand(B, N, generator=pick).cumsum(1),
            ],
        ),
        "accept_tree": (
            lambda *given, backend: bk.accept_tree(DraftTree(*given[:5], max_depth=6), given[5], backend=backend),
            [*tree, whole(3, B, N)],
        ),
        "verify_tree": (
            lambda z, at, *given, backend: bk.verify_tree(
                z, DraftTree(*given[:5], max_depth=6), at, sampling_of(*given[5:]), backend=backend
            ),
            [normal(B, N, V), whole(99, B), *tree, *knobs(B)],
        ),
        "verify_chain": (
            lambda p, q, drafted, at, *fields, backend: bk.verify_chain(
                p, q, drafted, at, sampling_of(*fields), backend=backend
            ),
            [normal(B, M + 1, V), normal(B, M, V), whole(V, B, M), whole(99, B), *knobs(B)],
        ),
        "compact_cache_": (
            lambda cache, *given, backend: (bk.compact_cache_(cache, *given, backend=backend), cache)[1],
            [cache, path, few, one],
        ),
        "skinny_linear": (bk.skinny_linear, [normal(R, T, D), normal(V, D)]),
        "int8_linear": (
            bk.int8_linear,
            [normal(R, T, 32 * M), whole(99, V, 32 * M, dtype=torch.int8), normal(V, M).abs()],
        ),
        "decoder_layer": (
            lambda x, cos, sin, keys, values, *given, backend: (
                bk.decoder_layer(x, layer_of(given[:9]), cos, sin, keys, values, *given[9:], backend=backend),
                keys,
                values,
            ),
            [
                *(normal(B, N, width) for width in (D + 3, D // 2, D // 2)),
                *(normal(B, K, S, D) for _ in range(2)),
                *(normal(outputs, D + 3) / 8 for outputs in (H * D, K * D, K * D)),
                normal(D + 3, H * D) / 8,
                *(normal(T, D + 3) / 8 for _ in range(2)),
                normal(D + 3, T) / 8,
                *(normal(size) for size in (D + 3, D)),
                one * 3,
                whole(9, B, N, 1),
            ],
        ),
    }
