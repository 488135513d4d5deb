"""The draft's side of a round: its key-value cache, and candidates level by level."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from beagle_kernels import Sampling, top_candidates, tree_attention
from beagle_sd.models.cache import grown
from beagle_sd.models.draft import Angles, BeagleDraft
from beagle_sd.models.layers.draft_layer import draft_layer
from beagle_sd.models.layers.linears import few_rows


class Candidates(NamedTuple):
    """Every candidate of a round in level order: tokens [B, M] int64, cumulative scores [B, M] f32, parents [B, M]
    int32, the parent's candidate index (-1: the root)."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor


class DraftCache:
    """Keys and values [B, Hkv, S, D] of the draft's one block: true states, and those of the round in progress behind.

    Position j's true state is in slot j, a round's draft states lie from a row's length on, and `reserve` makes room.
    With window_keys `ring` slots, however long the text is, hold position j in slot j % ring, and the draft states lie
    behind them. A round writes true states up to `depth` behind the row's new length, which nobody sees; the ring is
    longer than the window by as much, so that they never overwrite a key that is still to be seen.
    """

    def __init__(self, draft: BeagleDraft, batch: int, tokens: int, depth: int, branch: int):
        """Room for `tokens` true states a row and a round's draft states of `depth` levels of `branch` nodes each."""
        config, weight = draft.config, draft.norm_mlp.weight
        self.window = config.window_keys
        self.ring = self.window + depth + 1 if self.window else 0
        self._behind = branch * depth if self.window else max(depth + 1, branch * depth)
        shape = batch, config.num_key_value_heads, self._slots(tokens), config.head_dim
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.layer = draft_layer(draft)
        self._ahead = depth + 2  # of the last true state, positions that a round needs angles of
        self.reserve(tokens)
        self._rows = torch.arange(batch, device=weight.device)[:, None]
        self._none = torch.zeros(batch, dtype=torch.int32, device=weight.device)

    def _slots(self, tokens: int) -> int:
        return (self.ring or tokens) + self._behind

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` true states a row at least, behind what is there: the tensors may move."""
        if self.layer is not None:
            self.layer.reserve(tokens + self._ahead)
        if (slots := self._slots(tokens)) > self.keys.shape[2]:
            self.keys, self.values = grown(self.keys, 2, slots), grown(self.values, 2, slots)

    def angles(self, draft: BeagleDraft, positions: Tensor) -> Angles:
        """`draft.angles` of positions [B, n], at most some behind the true states."""
        return draft.angles(positions) if self.layer is None else self.layer.angles(positions)

    def append(self, draft: BeagleDraft, states: Tensor, slots: Tensor, positions: Tensor | Angles) -> None:
        """Write the keys and values of states [B, n, d] at `positions` [B, n] into `slots` [B, n]."""
        keys, values = draft.keys_values(states, positions)
        self.keys[self._rows, :, slots] = keys
        self.values[self._rows, :, slots] = values

    def append_true(self, draft: BeagleDraft, states: Tensor, positions: Tensor) -> None:
        """Write the true states [B, n, d] of `positions` [B, n], those of a row one after the other."""
        if self.layer is not None and few_rows(states) and states.dtype == self.keys.dtype:
            start = positions[:, 0].to(torch.int32)
            self.layer.append(states, self.angles(draft, positions), self.keys, self.values, start, self.ring)
            return
        self._append_at(draft, states, positions)

    def _append_at(self, draft: BeagleDraft, states: Tensor, positions: Tensor) -> None:
        self.append(draft, states, positions % self.ring if self.ring else positions, positions)

    def begin(self, draft: BeagleDraft, states: Tensor, lengths: Tensor, begins: Tensor | None = None) -> None:
        """Write the true states [B, T, d] of prompts behind the `begins` [B] tokens that are there (None: none are), of
        which a row's first lengths[b] count; with a window, only the last `window` of those."""
        step = torch.arange(states.shape[1], device=states.device)[: self.window]
        count = lengths.long()[:, None]
        places = torch.minimum(step, count)  # behind a row's end nobody sees what is written
        if self.window:
            places = (count - 1 - step).clamp(min=0)
        states = states.gather(1, places.clamp(max=states.shape[1] - 1)[:, :, None].expand(-1, -1, states.shape[2]))
        self._append_at(draft, states, places if begins is None else begins.long()[:, None] + places)

    def part(self, rows: slice) -> DraftCache:
        """Some rows as a cache of their own, in the same memory, until `reserve` moves it."""
        one = copy(self)
        one.keys, one.values, one._none = self.keys[rows], self.values[rows], self._none[rows]
        one._rows = self._rows[: len(one.keys)]
        return one

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        pair, turned = torch.tensor([[row, other], [other, row]], device=self.keys.device)
        for kept in (self.keys, self.values):
            kept[pair] = kept[turned]

    def take(self, rows: Tensor, other: DraftCache) -> None:
        """Take all rows of another cache of the same draft, with no more slots, as `rows` [n] int64."""
        for mine, new in ((self.keys, other.keys), (self.values, other.values)):
            mine[rows, :, : new.shape[2]] = new

    def reusable(self, common: int, held: int) -> int:
        """How many of the first `common` tokens of a row, which holds `held`, need not be run again for a text that
        goes on otherwise behind them: what a window's ring had of tokens further back is written over."""
        return common if common == held or self.window is None else max(0, common - self.window)

    def prefix(self, lengths: Tensor) -> Tensor:
        """[B] int32: the slots at a row's start that every node sees. The draft states begin `ring` slots behind."""
        return self._none if self.ring else lengths

    def seen(self, lengths: Tensor, depth: int, words: int) -> Tensor | None:
        """Mask words [B, depth, words] int64 of the true keys that each level sees: at level d the last window - d of
        them. None if they are all in the prefix."""
        if self.window is None:
            return None
        slot = torch.arange(64 * words, device=lengths.device)
        length, level = lengths.long()[:, None, None], torch.arange(depth, device=lengths.device)
        age = (length - 1 - slot) % self.ring  # of the last position that went into the slot: 0 of the last of all
        most = torch.minimum(length, self.window - level[:, None])
        bits = torch.where((age < most) & (slot < self.ring), 1 << slot % 64, 0)
        return bits.unflatten(2, (words, 64)).sum(3)


Shaped = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The logits [B, n, V'] that nodes with these paths [B, n, P] choose by, of logits over the tokens given [V'], or all
(None)."""


def propose(
    draft: BeagleDraft,
    cache: DraftCache,
    lengths: Tensor,
    root: Tensor,
    sampling: Sampling,
    depth: int,
    branch: int,
    shaped: Shaped | None = None,
) -> Candidates:
    """`depth` levels of candidates below root [B], the token at position lengths[b] (docs/design.md: The tree).

    The best `branch` candidates of a level by cumulative score are expanded by `branch` children each. Nothing is read
    on the host (but by `shaped`), and all shapes follow from B, depth and branch.
    """
    batch, device = len(root), root.device
    branch = min(branch, draft.vocab)
    bits = _bits(cache.ring, 1 + branch * (depth - 1), device)
    prefix, seen = cache.prefix(lengths), cache.seen(lengths, depth, bits.shape[1])
    settings = {1: sampling, branch: sampling.repeat(branch) if branch > 1 else sampling}
    tokens, start = root[:, None], lengths.long()[:, None]
    score = torch.zeros(batch, 1, dtype=torch.float32, device=device)
    angles = cache.angles(draft, start + torch.arange(depth, device=device))
    number = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
    paths = tokens[:, :, None][:, :, :0]
    visible = torch.zeros(batch, 1, bits.shape[1], dtype=torch.int64, device=device)
    slot = first = 0
    found: list[Candidates] = []
    for level in range(depth):
        width = tokens.shape[1]
        turn = Angles(*(part[:, level : level + 1] for part in angles))
        if cache.window and level > cache.window:  # the window has left the first ancestors behind
            visible = visible & ~bits[: 1 + (level - cache.window - 1) * branch].sum(0)
        words = visible if seen is None else visible | seen[:, level : level + 1]
        more = draft.config.append_states and level + 1 < depth
        at = cache.ring + slot if more else None
        state = _states(draft, cache, tokens, turn, prefix, words, at)
        chosen = (start + (level + 1)).expand(-1, width).flatten()
        logits = draft.logits(state)
        if shaped is not None:
            logits = shaped(logits, paths, draft.draft_vocab)
        child, gain = top_candidates(logits.flatten(0, 1), branch, chosen, settings[width], token_ids=draft.draft_vocab)
        total = score[:, :, None] + gain.view(batch, width, branch).clamp(max=0.0)
        parents = number[:, :, None].expand(-1, -1, branch).to(torch.int32)
        found.append(Candidates(child.view(batch, -1), total.flatten(1), parents.flatten(1)))
        if level + 1 == depth:
            break
        if more:
            visible = visible | bits[slot : slot + width]
            slot += width
        score, best = total.flatten(1).topk(branch, dim=1)
        tokens, number = found[-1].tokens.gather(1, best), best + first
        first += width * branch
        above = (best // branch)[:, :, None]
        visible = visible.gather(1, above.expand(-1, -1, bits.shape[1]))
        if shaped is not None:
            paths = torch.cat((paths.gather(1, above.expand(-1, -1, level)), tokens[:, :, None]), 2)
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _states(
    draft: BeagleDraft,
    cache: DraftCache,
    tokens: Tensor,
    turn: Angles,
    prefix: Tensor,
    words: Tensor,
    append_at: int | None,
) -> Tensor:
    """Draft states [B, n, d] of tokens [B, n], which see the prefix and behind it the slots set in `words`; their keys
    and values go `append_at` slots behind the prefix, if given."""
    embedded = draft.embed(tokens)
    if cache.layer is not None and few_rows(embedded):
        return cache.layer(embedded, turn, cache.keys, cache.values, prefix, words, append_at)
    attended = tree_attention(draft.queries(embedded, turn), cache.keys, cache.values, prefix, words)
    state = draft.block(embedded, attended)
    if append_at is not None:
        slots = torch.arange(append_at, append_at + tokens.shape[1], device=tokens.device)
        cache.append(draft, state, prefix.long()[:, None] + slots, turn)
    return state


def _bits(first: int, count: int, device: torch.device) -> Tensor:
    """[count, words] int64: row i has only bit first + i set."""
    slot = torch.arange(first, first + count, device=device)
    word = torch.arange((first + count + 63) // 64, device=device)
    return torch.where(slot[:, None] // 64 == word, 1 << (slot[:, None] % 64), 0)
