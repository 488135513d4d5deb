"""The draft's side of a round: its key-value cache, and candidates level by level."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beagle_kernels import Sampling, top_candidates, tree_attention
from beagle_sd.models.cache import grown
from beagle_sd.models.draft import Angles, BeagleDraft


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

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots a row at least, behind what is there: the tensors may move."""
        if slots > self.keys.shape[2]:
            self.keys, self.values = grown(self.keys, 2, slots), grown(self.values, 2, slots)

    def append(self, draft: BeagleDraft, states: Tensor, slots: Tensor, positions: Tensor | Angles) -> None:
        """Write the keys and values of states [B, n, d] at `positions` [B, n] into `slots` [B, n]."""
        keys, values = draft.keys_values(states, positions)
        self.keys[self._rows, :, slots] = keys
        self.values[self._rows, :, slots] = values


def propose(
    draft: BeagleDraft, cache: DraftCache, lengths: Tensor, root: Tensor, sampling: Sampling, depth: int, branch: int
) -> Candidates:
    """`depth` levels of candidates below root [B], the token at position lengths[b] (docs/design.md: The tree).

    The best `branch` candidates of a level by cumulative score are expanded by `branch` children each. Nothing is read
    on the host, and all shapes follow from B, depth and branch.
    """
    batch, device = len(root), root.device
    branch = min(branch, len(draft.head))
    bits = _bits(1 + branch * (depth - 1), device)
    settings = {1: sampling, branch: sampling.repeat(branch) if branch > 1 else sampling}
    tokens, start = root[:, None], lengths.long()[:, None]
    score = torch.zeros(batch, 1, dtype=torch.float32, device=device)
    angles = draft.angles(start + torch.arange(depth, device=device))
    number = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
    visible = torch.zeros(batch, 1, bits.shape[1], dtype=torch.int64, device=device)
    slot = first = 0
    found: list[Candidates] = []
    for level in range(depth):
        width = tokens.shape[1]
        turn = Angles(*(part[:, level : level + 1] for part in angles))
        state = _states(draft, cache, tokens, turn, lengths, visible)
        chosen = (start + (level + 1)).expand(-1, width).flatten()
        child, gain = top_candidates(
            draft.logits(state).flatten(0, 1), branch, chosen, settings[width], token_ids=draft.draft_vocab
        )
        total = score[:, :, None] + gain.view(batch, width, branch).clamp(max=0.0)
        parents = number[:, :, None].expand(-1, -1, branch).to(torch.int32)
        found.append(Candidates(child.view(batch, -1), total.flatten(1), parents.flatten(1)))
        if level + 1 == depth:
            break
        if draft.config.append_states:
            slots = torch.arange(slot, slot + width, device=device)
            cache.append(draft, state, start + slots, turn)
            visible = visible | bits[slot : slot + width]
            slot += width
        score, best = total.flatten(1).topk(branch, dim=1)
        tokens, number = found[-1].tokens.gather(1, best), best + first
        first += width * branch
        visible = visible.gather(1, (best // branch)[:, :, None].expand(-1, -1, bits.shape[1]))
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _states(draft, cache, tokens, turn, lengths, visible) -> Tensor:
    """Draft states [B, n, d] of tokens [B, n], which see the row's true keys and the slots set in `visible`."""
    embedded = draft.embed(tokens)
    attended = tree_attention(draft.queries(embedded, turn), cache.keys, cache.values, lengths, visible)
    return draft.block(embedded, attended)


def _bits(count: int, device: torch.device) -> Tensor:
    """[count, words] int64: row i has only bit i set."""
    slot = torch.arange(count, device=device)
    word = slot[: (count + 63) // 64]
    return torch.where(slot[:, None] // 64 == word, 1 << (slot[:, None] % 64), 0)
