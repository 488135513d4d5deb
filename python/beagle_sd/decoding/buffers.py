"""What a round reads and writes: fixed tensors, a row a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from beagle_kernels import Sampling
from beagle_sd.decoding.drafting import DraftCache
from beagle_sd.decoding.trees.lookup import Lookup
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.cache import grown
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.target import Target

NEWS = 6
"""Columns of the news before the round's tokens: drafted tokens accepted, tokens emitted so far, whether the row goes
on, status bits, and of the lookup branch that it had: how long the match was, and how many of its tokens came."""


class Kept:
    """What is kept of a text beside its tokens, each by the token's place in it, or None.

    logprobs [B, *] f32, what the target gave each token; top_tokens [B, *, k] int64 and top_logprobs [B, *, k] f32, its
    k best there; states [B, *, d] bf16, the target's top hidden states.
    """

    def __init__(self, target: Target, batch: int, *, logprobs: bool, top: int, states: bool):
        device = target.device
        f32 = torch.float32
        self.logprobs = torch.zeros(batch, 0, dtype=f32, device=device) if logprobs else None
        self.top_tokens = torch.zeros(batch, 0, top, dtype=torch.int64, device=device) if top else None
        self.top_logprobs = torch.zeros(batch, 0, top, dtype=f32, device=device) if top else None
        size = target.config.hidden_size
        self.states = torch.zeros(batch, 0, size, dtype=torch.bfloat16, device=device) if states else None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


class Buffers:
    """Everything a round reads and writes, for B rows of at most `tokens` prompt and new tokens; `reserve` makes room.

    cache, draft_cache; text [B, *] int64: a row's prompt of prompts[b] tokens and behind it the new ones, of which
    emitted[b] are there and limit[b] are the most; pending [B] int64, the last of them, whose keys are not cached yet;
    live [B] bool; ends [V] bool: the tokens that end a row; kept; sampling; lookup: what stood behind the text's end
    when it stood earlier in the text; news [B, NEWS + levels + 1] int64: the round for the host. A row that is not live
    keeps all of its values.
    """

    def __init__(
        self,
        target: Target,
        draft: BeagleDraft | None,
        batch: int,
        tokens: int,
        shape: TreeShape,
        *,
        page_size: int | None = None,
        fixed: bool = False,
        logprobs: bool = False,
        top: int = 0,
        states: bool = False,
    ):
        device, self.shape, self.tokens = target.device, shape, tokens
        slots, width = self._sizes()
        self.cache = target.new_cache(batch, slots, page_size=page_size, at_once=shape.num_nodes, fixed=fixed)
        self.draft_cache = None
        if draft is not None:
            self.draft_cache = DraftCache(draft, batch, tokens - 1, shape.deepest, shape.branch)
        self.pending = torch.zeros(batch, dtype=torch.int64, device=device)
        self.live = torch.zeros(batch, dtype=torch.bool, device=device)
        self.prompts, self.emitted, self.limit = (torch.zeros_like(self.pending) for _ in range(3))
        self.ends = torch.zeros(target.config.vocab_size, dtype=torch.bool, device=device)
        self.text = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.kept = Kept(target, batch, logprobs=logprobs, top=top, states=states)
        self._widen_kept(width)
        self.sampling = Sampling.of(batch, device=device)
        self.lookup = Lookup(batch, shape.lookup, device)
        self.news = torch.zeros(batch, NEWS + shape.deepest + 1, dtype=torch.int64, device=device)

    def _sizes(self) -> tuple[int, int]:
        """Slots a row of the target's cache, and columns of the text."""
        # the last token of a row is never cached
        return self.tokens - 1 + self.shape.num_nodes, self.tokens + self.shape.deepest + 1

    def _widen_kept(self, width: int) -> None:
        for name, value in self.kept.tensors().items():
            setattr(self.kept, name, grown(value, 1, width))

    def reserve(self, tokens: int, most: int) -> None:
        """Make room for `tokens` prompt and new tokens a row; if they are too few, for twice as many as before but not
        more than `most`. The tensors that grow move: not once a graph holds them."""
        if tokens <= self.tokens:
            return
        self.tokens = min(most, max(tokens, 2 * self.tokens))
        slots, width = self._sizes()
        self.cache.reserve(slots)
        if self.draft_cache is not None:
            self.draft_cache.reserve(self.tokens - 1)
        self.text = grown(self.text, 1, width)
        self._widen_kept(width)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        found |= {**self.cache.tensors(), **self.sampling._asdict(), **self.kept.tensors(), **self.lookup.tensors()}
        if self.draft_cache is not None:
            found |= {"draft_keys": self.draft_cache.keys, "draft_values": self.draft_cache.values}
        return found

    def part(self, rows: slice) -> Buffers:
        """Some rows as buffers of their own, in the same memory, until `reserve` moves it."""
        one = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "ends":
                setattr(one, name, value[rows])
        one.cache, one.lookup, one.kept = self.cache.part(rows), self.lookup.part(rows), copy(self.kept)
        for name, value in self.kept.tensors().items():
            setattr(one.kept, name, value[rows])
        one.sampling = Sampling(*(field[rows] for field in self.sampling))
        if self.draft_cache is not None:
            one.draft_cache = self.draft_cache.part(rows)
        return one

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        self.cache.swap(row, other)
        if self.draft_cache is not None:
            self.draft_cache.swap(row, other)
        pair, turned = torch.tensor([[row, other], [other, row]], device=self.live.device)
        own = [value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "ends"]
        for value in [*own, *self.sampling, *self.kept.tensors().values(), *self.lookup.rows()]:
            value[pair] = value[turned]

    def set_ends(self, ends: list[int]) -> None:
        self.ends.zero_()
        if ends := [token for token in ends if 0 <= token < len(self.ends)]:
            self.ends[torch.tensor(ends, device=self.ends.device)] = True

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no row is live: a round changes nothing that a later one reads."""
        live = self.live.clone()
        self.live.zero_()
        try:
            yield
        finally:
            self.live.copy_(live)
