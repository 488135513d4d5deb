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
    adds it. Rows that are not to be learnt are not computed, and 0."""
    learnt = batch.loss_mask.nonzero().flatten()
    embedded = draft.embed(batch.tokens.index_select(0, learnt))
    attended = _attention_to_states(draft, batch, keys_of, window, offset, embedded, learnt)[0]
    return _at(learnt, draft.block(embedded, attended.index_select(0, learnt)), len(batch.tokens))


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
    by_step = rows_by_step(batch, window, offset)
    computed = torch.cat(by_step)
    embedded = draft.embed(batch.tokens.index_select(0, computed))
    prefix, lse, queries = _attention_to_states(draft, batch, keys_of, window, offset, embedded, computed)
    states: list[Tensor] = []
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    for rows, known in zip(by_step, embedded.split([len(rows) for rows in by_step]), strict=True):
        attended = prefix.index_select(0, rows)
        if own_keys:
            attended = _again(_extended, prefix, lse, queries, rows, tuple(own_keys), tuple(own_values))
        state = draft.block(known, attended)
        states.append(state)
        if draft.config.append_states and len(states) < window:
            seen = state.detach() if detach_states else state
            key, value = _again(draft.keys_values, seen, batch.positions.index_select(0, rows))
            own_keys.append(key)
            own_values.append(value)
    return _at(computed, torch.cat(states), len(batch.tokens))


def _attention_to_states(
    draft: BeagleDraft,
    batch: Batch,
    keys_of: Tensor,
    window: int,
    offset: Tensor,
    embedded: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `rows`, whose embeddings are `embedded`, to the target's states: out [T, Hq, D], lse [T, Hq] and the
    queries [T, Hq, D], which mean nothing in other rows."""
    keys, values = draft.keys_values(keys_of, batch.positions)
    queries = draft.queries(embedded, batch.positions.index_select(0, rows))
    queries = _at(rows, queries, len(batch.tokens))
    reach = draft.config.window_keys
    out, lse = block_attention(queries, keys, values, window, offset, batch.cu_seqlens, reach=reach)
    return out, lse, queries


def _at(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """[count, ...]: the values [n, ...] in these rows, elsewhere 0."""
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)


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
    """For step m, the rows s + m of all windows that reach it and have a row to learn, windows that reach further
    first: so the rows of a step stand in the order of the step before, and a prefix of its keys belongs to them. Reads
    the device once."""
    rows = len(batch.tokens)
    start = offset.long() + batch.cu_seqlens[:-1].long()
    end = batch.cu_seqlens[1:].long()
    windows = ((end - start).clamp(min=0) + window - 1) // window
    last = windows.cumsum(0)
    number = torch.arange(rows // window + len(windows), device=start.device)  # no fewer than there are
    which = torch.searchsorted(last, number, right=True).clamp(max=len(windows) - 1)
    starts = start.index_select(0, which) + window * (number - (last - windows).index_select(0, which))
    reach = (end.index_select(0, which) - starts).clamp(0, window)
    learnt = torch.cat([last.new_zeros(1), batch.loss_mask.cumsum(0)])
    some = learnt.index_select(0, (starts + reach).clamp(max=rows)) > learnt.index_select(0, starts.clamp(max=rows))
    reach = reach * (some & (number < last[-1]))
    steps = torch.arange(window, device=start.device)
    reached = (reach[:, None] > steps).sum(0).tolist()
    starts = starts.index_select(0, torch.sort(reach, descending=True, stable=True).indices)
    return [starts[:count] + step for step, count in enumerate(reached)]
