"""A round as one function over fixed buffers, read nowhere on the host (docs/design.md: A round of decoding).

What a round writes, it writes in place; every shape follows from the batch and the tree's. So a CUDA graph of one round
replays as any later one, and on the CPU the same function runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from beagle_kernels import (
    DraftTree,
    Verdict,
    build_tree,
    compact_cache_,
    join_branch,
    verify_tree,
)
from beagle_sd.decoding.buffers import NEWS, Buffers
from beagle_sd.decoding.drafting import propose
from beagle_sd.decoding.settings.shaping import Shaping
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.target import Target

Timed = Callable[[str], AbstractContextManager[None]]


def _untimed(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def play_round(
    target: Target,
    draft: BeagleDraft | None,
    buffers: Buffers,
    shape: TreeShape,
    shaping: Shaping | None = None,
    timed: Timed = _untimed,
) -> None:
    """Draft a tree, let the target verify it, keep what it would have said itself: one to levels + 1 tokens a row."""
    with timed("draft"):
        tree = _draft_tree(draft, buffers, shape, shaping)
    with timed("target"):
        hidden = target.forward(tree.tokens, tree.depth, tree.mask, buffers.cache)
    with timed("verify"):
        logits = target.head(hidden)
        scores = logits if shaping is None else shaped(logits, paths_of(tree), buffers, shaping)
        verdict = verify_tree(scores, tree, buffers.cache.lengths.long() + 1, buffers.sampling)
    with timed("keep"):
        _keep(draft, buffers, tree, verdict, hidden, logits)


def shaped(
    logits: Tensor, paths: Tensor, buffers: Buffers, shaping: Shaping | None, token_ids: Tensor | None = None
) -> Tensor:
    """The logits [B, N, V] that nodes choose by whose tokens below the text are paths [B, N, P]."""
    if shaping is None:
        return logits
    return shaping.scores(logits, paths, buffers.text, buffers.prompts, buffers.emitted, token_ids)


def paths_of(tree: DraftTree) -> Tensor:
    """[B, N, max_depth] int64: each node's ancestors below the root, and itself last; -1 before the first."""
    parents = tree.parents.long().clamp(min=0)
    at = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    found: list[Tensor] = []
    for _ in range(tree.max_depth):
        found.insert(0, torch.where(tree.depth.gather(1, at) > 0, tree.tokens.gather(1, at), -1))
        at = parents.gather(1, at)
    return torch.stack(found, 2) if found else tree.tokens[:, :, None][:, :, :0]


def _draft_tree(draft: BeagleDraft | None, buffers: Buffers, shape: TreeShape, shaping: Shaping | None) -> DraftTree:
    root = buffers.pending
    if draft is None or buffers.draft_cache is None or shape.num_nodes == 1:
        none = root[:, None][:, :0]
        return build_tree(root, none, none.float(), none.to(torch.int32), 1, 0)
    lean = None
    if shaping is not None:
        lean = lambda logits, paths, ids: shaped(logits, paths, buffers, shaping, ids)  # noqa: E731
    candidates = propose(
        draft, buffers.draft_cache, buffers.cache.lengths, root, buffers.sampling, shape.depth, shape.branch, lean
    )
    joined: tuple[Tensor, Tensor, Tensor] = (*candidates,)
    if shape.lookup:
        joined = join_branch(*joined, *buffers.lookup.branch(shape.lookup))
    if shaping is not None and (forced := shaping.forced(shape.levels)) is not None:
        joined = join_branch(*joined, forced, torch.zeros_like(forced, dtype=torch.float32))
    return build_tree(root, *joined, shape.num_nodes, shape.deepest)


def _keep(draft, buffers: Buffers, tree: DraftTree, verdict: Verdict, hidden: Tensor, logits: Tensor) -> None:
    """Move the accepted nodes' keys into place, give their states to the draft, emit their tokens, advance."""
    lengths, path = buffers.cache.lengths, verdict.path.long().clamp(min=0)
    step = torch.arange(path.shape[1], device=path.device)
    if path.shape[1] > 1:
        for states, span in zip(buffers.cache.states, buffers.cache.spans, strict=True):
            compact_cache_(states, verdict.path, verdict.num_accepted, lengths, block_table=buffers.cache.table(span))
    if buffers.draft_cache is not None or buffers.kept.states is not None:
        states, places = (
            hidden.gather(1, path[:, :, None].expand(-1, -1, hidden.shape[2])),
            lengths.long()[:, None] + step,
        )
        if buffers.draft_cache is not None:
            buffers.draft_cache.append_true(draft, states, places)
        if buffers.kept.states is not None:
            put(buffers.kept.states, places, states)
    run = verdict.next_token[:, None]
    if path.shape[1] > 1:
        drafted = tree.tokens.gather(1, path).roll(-1, 1)
        run = torch.where(step < verdict.num_accepted[:, None], drafted, run)
    buffers.cache.advance(emit(buffers, verdict, run, logits))


def emit(buffers: Buffers, verdict: Verdict, run: Tensor, logits: Tensor) -> Tensor:
    """Append run [B, L], of which num_accepted + 1 tokens count, to the live rows, each cut at its first end token and
    at its limit; returns how many were appended [B] int64."""
    count, live = run.shape[1], buffers.live
    step = torch.arange(count, device=run.device)
    places = (buffers.prompts + buffers.emitted)[:, None] + step
    buffers.text.scatter_(1, places, run)
    if buffers.kept.logprobs is not None or buffers.kept.top_logprobs is not None:
        at = verdict.path.long().clamp(min=0)[:, :, None].expand(-1, -1, logits.shape[2])
        keep_logprobs(buffers, logits.gather(1, at), run, places)
    end = torch.where(buffers.ends[run], step, count).amin(1)
    taken = torch.minimum(torch.minimum(verdict.num_accepted, end) + 1, buffers.limit - buffers.emitted) * live
    status = verdict.status * live
    torch.where(live, verdict.next_token, buffers.pending, out=buffers.pending)
    buffers.emitted += taken
    live &= (end >= taken) & (buffers.emitted < buffers.limit)
    agreed = torch.minimum(buffers.lookup.agreed(run), taken)
    buffers.lookup.find(buffers.text, buffers.prompts + buffers.emitted)
    told = verdict.num_accepted, buffers.emitted, live, status, buffers.lookup.matched, agreed
    buffers.news[:, : NEWS + count] = torch.cat((torch.stack([one.long() for one in told], 1), run), 1)
    return taken


def put(kept: Tensor, places: Tensor, values: Tensor) -> None:
    """Write values [B, n, ...] at places [B, n] of kept [B, S, ...]."""
    kept[torch.arange(len(kept), device=kept.device)[:, None], places] = values.to(kept.dtype)


def keep_logprobs(buffers: Buffers, logits: Tensor, tokens: Tensor, places: Tensor) -> None:
    """Keep, at places [B, n], log softmax of logits [B, n, V] for the tokens there [B, n], and the best ones."""
    rows, kept = logits.float(), buffers.kept
    rows = torch.where(rows.isnan(), -torch.inf, rows)
    total = rows.logsumexp(-1, keepdim=True)
    if kept.logprobs is not None:
        put(kept.logprobs, places, (rows.gather(2, tokens[:, :, None]) - total)[:, :, 0])
    if kept.top_tokens is not None and kept.top_logprobs is not None:
        best = rows.topk(kept.top_tokens.shape[2], dim=2)
        put(kept.top_tokens, places, best.indices)
        put(kept.top_logprobs, places, best.values - total)
