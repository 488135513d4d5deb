"""The draft's side of a round: its key-value cache, and the candidates of a tree, level by level."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beagle_kernels import Sampling, top_candidates, tree_attention
from beagle_sd.draft import BeagleDraft


class Candidates(NamedTuple):
    """Every candidate of a round in level order: tokens [B, M] int64, cumulative scores [B, M] f32, parents [B, M]
    int32, the parent's candidate index (-1: the root)."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor


class DraftCache:
    """Keys and values [B, Hkv, S, D] of the draft's one block: true states below a row's length, and above it the
    draft states of the round in progress."""

    def __init__(self, draft: BeagleDraft, batch: int, slots: int):
        config, weight = draft.config, draft.k_proj.weight
        shape = batch, config.num_key_value_heads, slots, config.head_dim
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self._rows = torch.arange(batch, device=weight.device)[:, None]

    def append(self, draft: BeagleDraft, states: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Write the keys and values of states [B, n, d] at `positions` [B, n] into `slots` [B, n]."""
        keys, values = draft.keys_values(states.flatten(0, 1), positions.flatten())
        self.keys[self._rows, :, slots] = keys.unflatten(0, slots.shape)
        self.values[self._rows, :, slots] = values.unflatten(0, slots.shape)


def propose(
    draft: BeagleDraft, cache: DraftCache, lengths: Tensor, root: Tensor, sampling: Sampling, depth: int, branch: int
) -> Candidates:
    """`depth` levels of candidates below root [B], the token at position lengths[b] (DESIGN: sections 1 and 3).

    The best `branch` candidates of a level by cumulative score are expanded by `branch` children each.
    """
    batch, device = len(root), root.device
    branch = min(branch, len(draft.head))
    limit = int(lengths.max()) + 1 + branch * (depth - 1)
    words = (branch * (depth - 1)) // 64 + 1
    tokens, score = root[:, None], torch.zeros(batch, 1, device=device)
    number = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
    visible = torch.zeros(batch, 1, words, dtype=torch.int64, device=device)
    slot = 0
    found: list[Candidates] = []
    for level in range(depth):
        width = tokens.shape[1]
        position = (lengths.long() + level)[:, None].expand(-1, width)
        state = _states(draft, cache, tokens, position, lengths, visible, limit)
        child, gain = top_candidates(
            draft.logits(state), branch, (position + 1).flatten(), sampling.repeat(width), token_ids=draft.draft_vocab
        )
        total = score[:, :, None] + gain.view(batch, width, branch).clamp(max=0.0)
        first = sum(part.tokens.shape[1] for part in found)
        parents = number[:, :, None].expand(-1, -1, branch).to(torch.int32)
        found.append(Candidates(child.view(batch, -1), total.flatten(1), parents.flatten(1)))
        if level + 1 == depth:
            break
        if draft.config.append_states:
            own = torch.arange(slot, slot + width, device=device)
            cache.append(draft, state.view(batch, width, -1), lengths.long()[:, None] + own, position)
            visible = visible | _bits(own, words)
            slot += width
        score, best = total.flatten(1).topk(branch, dim=1)
        tokens, number = found[-1].tokens.gather(1, best), best + first
        visible = visible.gather(1, (best // branch)[:, :, None].expand(-1, -1, words))
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _states(draft, cache, tokens, position, lengths, visible, limit) -> Tensor:
    """Draft states [B * n, d] of tokens [B, n], which see the row's true keys and the slots set in `visible`."""
    embedded = draft.embed(tokens.flatten())
    queries = draft.queries(embedded, position.flatten()).unflatten(0, tokens.shape)
    attended = tree_attention(queries, cache.keys[:, :, :limit], cache.values[:, :, :limit], lengths, visible)
    return draft.block(embedded, attended.flatten(0, 1))


def _bits(slots: Tensor, words: int) -> Tensor:
    """[n, words] int64: row i has only bit slots[i] set."""
    word = torch.arange(words, device=slots.device)
    return torch.where(slots[:, None] // 64 == word, torch.ones_like(slots)[:, None] << (slots[:, None] % 64), 0)
