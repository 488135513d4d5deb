"""The two training passes: block attention, and the one-pass simulation of drafting (docs/design.md: Training)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beagle_kernels import block_attention, extend_attention
from beagle_sd.data.batch import Batch
from beagle_sd.models.draft import BeagleDraft


def row_weights(batch: Batch, window: int, offset: Tensor, *, simulated: bool) -> Tensor:
    """f32 [T]: what each row's loss counts. 0 for rows before the first window, in a window that starts at
    position 0 (it sees no true key), or outside the assistant's tokens; else 1, or window - m in simulation,
    since pass r of the paper's figure 2 computes rows 0..r of a window anew."""
    first = offset.long().index_select(0, batch.sequence)
    step = (batch.positions - first) % window
    counted = batch.loss_mask & (batch.positions >= first) & (batch.positions - step > 0)
    return counted * ((window - step).float() if simulated else 1.0)


def block_states(draft: BeagleDraft, batch: Batch, keys_of: Tensor, window: int, offset: Tensor) -> Tensor:
    """Stage 1: draft states [T, d]; each row sees the true keys before its window, with window_keys the row i those
    from i - window_keys on. keys_of [T, d] are the states that give the keys: the target's, with noise where training
    adds it."""
    embedded = draft.embed(batch.tokens)
    keys, values = draft.keys_values(keys_of, batch.positions)
    queries = draft.queries(embedded, batch.positions)
    reach = draft.config.window_keys
    attended, _ = block_attention(queries, keys, values, window, offset, batch.cu_seqlens, reach=reach)
    return draft.block(embedded, attended)


def simulated_states(
    draft: BeagleDraft, batch: Batch, keys_of: Tensor, window: int, offset: Tensor, *, detach_states: bool = False
) -> Tensor:
    """Stage 2: draft states [T, d]; row s + m sees the true keys before s and the draft states s .. s + m - 1.

    The part that attends true keys runs once for all rows; step m then adds at most m keys of its first to one row a
    window. Rows before the first window stay 0. Gradients flow through the draft states unless detach_states. With
    window_keys true keys are seen as in stage 1, and a row sees all draft states of its window: ValueError where the
    window is longer than window_keys.
    """
    reach = draft.config.window_keys
    if reach is not None and window > reach:
        raise ValueError(f"{window} steps of simulation; allowed: up to the draft's window_keys, {reach}")
    embedded = draft.embed(batch.tokens)
    keys, values = draft.keys_values(keys_of, batch.positions)
    queries = draft.queries(embedded, batch.positions)
    prefix, lse = block_attention(queries, keys, values, window, offset, batch.cu_seqlens, reach=reach)
    states: list[Tensor] = []
    rows_done: list[Tensor] = []
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    for rows in rows_by_step(batch, window, offset):
        attended = prefix.index_select(0, rows)
        if own_keys:
            attended = _again(_extended, prefix, lse, queries, rows, tuple(own_keys), tuple(own_values))
        state = draft.block(embedded.index_select(0, rows), attended)
        states.append(state)
        rows_done.append(rows)
        if draft.config.append_states and len(states) < window:
            seen = state.detach() if detach_states else state
            key, value = _again(draft.keys_values, seen, batch.positions.index_select(0, rows))
            own_keys.append(key)
            own_values.append(value)
    if not states:  # every sequence is shorter than its offset: zeros that backward can still pass
        return draft.block(embedded, prefix) * 0.0
    done = torch.cat(states)
    return done.new_zeros(len(batch.tokens), done.shape[1]).index_copy(0, torch.cat(rows_done), done)


def _extended(
    prefix: Tensor, lse: Tensor, queries: Tensor, rows: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> Tensor:
    """Attention of `rows`, that over true keys merged with that over the first of the keys of the steps before."""
    local = [torch.stack([part[: len(rows)] for part in parts], 1) for parts in (keys, values)]
    return extend_attention(*(x.index_select(0, rows) for x in (prefix, lse, queries)), *local)[0]


def _again(function: Callable, *args):
    """function(*args), computed anew in backward: what is cheap here would be kept besides what stage 1 keeps."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def draft_states(
    draft: BeagleDraft,
    batch: Batch,
    keys_of: Tensor,
    window: int,
    offset: Tensor,
    *,
    simulated: bool,
    detach_states: bool = False,
) -> Tensor:
    """What the trainer asks of a draft, `simulated` in stage 2 and in evaluation: its states [T, d]."""
    if simulated:
        return simulated_states(draft, batch, keys_of, window, offset, detach_states=detach_states)
    return block_states(draft, batch, keys_of, window, offset)


def rows_by_step(batch: Batch, window: int, offset: Tensor) -> list[Tensor]:
    """For step m, the rows s + m of all windows that reach it, windows that reach further first: so the rows of
    a step stand in the order of the step before, and a prefix of its keys belongs to them. Reads the device once."""
    start = offset.long() + batch.cu_seqlens[:-1].long()
    end = batch.cu_seqlens[1:].long()
    length = (end - start).clamp(min=0)
    steps = torch.arange(window, device=length.device)
    reached = (((length[:, None] - steps).clamp(min=0) + window - 1) // window).sum(0).tolist()
    count = (length + window - 1) // window
    every = torch.arange(len(count), device=count.device)
    which = torch.repeat_interleave(every, count, output_size=reached[0])
    first = (torch.cumsum(count, 0) - count).index_select(0, which)
    starts = start.index_select(0, which) + window * (torch.arange(reached[0], device=which.device) - first)
    reach = (end.index_select(0, which) - starts).clamp(max=window)
    starts = starts.index_select(0, torch.sort(reach, descending=True, stable=True).indices)
    return [starts[:rows] + step for step, rows in enumerate(reached) if rows]
