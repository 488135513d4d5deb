"""Rules as a round applies them: tensors with a row a text, and what asks the host."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beagle_kernels import Adjustments, adjust_logits
from beagle_sd.decoding.guides.walk import Walk
from beagle_sd.decoding.settings.on_host import processed
from beagle_sd.decoding.settings.rules import Rules

_NO_ROW = -2
"""Of phrases that are of no row."""


@dataclass
class Slot:
    """A text's rules; its tokens as processors are shown them, the prompt as it was given and the new ones; where it
    stands in its guide."""

    rules: Rules
    shown: list[int]
    new: list[int] = field(default_factory=list)
    walk: Walk | None = None

    @classmethod
    def of(cls, rules: Rules, shown: Sequence[int]) -> Slot:
        return cls(rules, [*shown], walk=rules.guide.begin() if rules.guide is not None else None)

    def say(self, run: list[int]) -> None:
        """The text has these tokens more."""
        self.new += run
        if self.walk is not None and run:
            self.walk.accept(run)


class Shaping:
    """The rules of B texts. `moved`: a tensor is another than before, so that graphs that read it are to go."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self.adjustments = Adjustments.of(batch, device=device)
        self.slots: list[Slot | None] = [None] * batch
        self.moved = False

    @property
    def idle(self) -> bool:
        """Whether no text has rules."""
        return not any(slot is not None and slot.rules for slot in self.slots)

    @property
    def on_host(self) -> bool:
        return any(slot is not None and slot.rules.on_host for slot in self.slots)

    def set(self, row: int, slot: Slot | None) -> None:
        """Let a row's text be another, with its own rules."""
        rules = Rules() if slot is None else slot.rules
        self.slots[row] = slot
        made = self.adjustments
        for values, value in (
            (made.repetition, rules.repetition),
            (made.frequency, rules.frequency),
            (made.presence, rules.presence),
            (made.ngram, rules.ngram),
        ):
            values[row] = value
        self._set_tokens("added", row, rules.added, torch.float32)
        self._set_tokens("first", row, rules.first, torch.int32)
        self._set_phrases()

    def clear(self) -> None:
        """Let no text have rules."""
        for row, slot in enumerate(self.slots):
            if slot is not None:
                self.set(row, None)

    def _set_tokens(self, name: str, row: int, values: dict, dtype: torch.dtype) -> None:
        known = getattr(self.adjustments, name)
        if known is None:
            if not values:
                return
            known = torch.zeros(len(self.slots), self.vocab_size, dtype=dtype, device=self.device)
            self.adjustments, self.moved = self.adjustments._replace(**{name: known}), True
        known[row] = 0
        if inside := {token: value for token, value in values.items() if 0 <= token < self.vocab_size}:
            index = torch.tensor(list(inside), device=self.device)
            known[row, index] = torch.tensor(list(inside.values()), dtype=dtype, device=self.device)

    def _set_phrases(self) -> None:
        """Those of all rows anew, in the tensors that are there if they have the room."""
        rows = [slot.rules.phrases if slot is not None else {} for slot in self.slots]
        found = [(row, *one) for row, phrases in enumerate(rows) for one in phrases.items()]
        longest = max((len(tokens) for _, tokens, _ in found), default=0)
        count, width = self.adjustments.phrases.shape
        if len(found) > count or longest > width:
            self.moved = True
            count, width = max(count, len(found)), max(width, longest)
            self.adjustments = self.adjustments._replace(
                phrases=torch.full((count, width), -1, dtype=torch.int64, device=self.device),
                phrase_bias=torch.zeros(count, dtype=torch.float32, device=self.device),
                phrase_rows=torch.full((count,), _NO_ROW, dtype=torch.int32, device=self.device),
            )
        if not count:
            return
        spare = count - len(found)
        tokens = [[-1] * (width - len(one)) + [*one] for _, one, _ in found] + [[0] * width] * spare
        self.adjustments.phrases.copy_(torch.tensor(tokens))
        self.adjustments.phrase_bias.copy_(torch.tensor([*(bias for *_, bias in found), *([0.0] * spare)]))
        self.adjustments.phrase_rows.copy_(torch.tensor([*(row for row, *_ in found), *([_NO_ROW] * spare)]))

    def swap(self, row: int, other: int) -> None:
        """Let two texts change places."""
        slots = self.slots[row], self.slots[other]
        self.set(row, slots[1])
        self.set(other, slots[0])

    def part(self, rows: slice) -> Shaping:
        """The rules of some texts, in the same memory."""
        one, made = copy(self), self.adjustments
        one.slots = self.slots[rows]
        own = torch.where(made.phrase_rows >= rows.start, made.phrase_rows - rows.start, _NO_ROW)
        cut = {name: getattr(made, name)[rows] for name in ("repetition", "frequency", "presence", "ngram")}
        for name in ("added", "first"):
            values = getattr(made, name)
            cut[name] = None if values is None else values[rows]
        one.adjustments = made._replace(phrase_rows=own, **cut)
        return one

    def scores(
        self,
        logits: Tensor,
        paths: Tensor,
        text: Tensor,
        prompts: Tensor,
        emitted: Tensor,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, N, V'] that nodes choose by whose tokens below the text [B, *] are paths [B, N, P]."""
        scores = adjust_logits(
            logits,
            paths,
            text,
            (prompts + emitted).to(torch.int32),
            prompts.to(torch.int32),
            self.adjustments,
            token_ids=token_ids,
            allowed=self._allowed(paths),
        )
        if any(slot is not None and slot.rules.processors for slot in self.slots):
            return processed(scores, paths, self.slots, token_ids, self.vocab_size)
        return scores

    def _allowed(self, paths: Tensor) -> Tensor | None:
        """The mask of each node [B, N, words] by the guides; None where no text has one."""
        walks = [slot.walk if slot is not None else None for slot in self.slots]
        if not any(walks):
            return None
        words = (self.vocab_size + 31) // 32
        masks = torch.full((*paths.shape[:2], words), -1, dtype=torch.int32)
        for row, walk in enumerate(walks):
            if walk is not None:
                walk.masks([[token for token in path if token >= 0] for path in paths[row].tolist()], masks[row])
        return masks.to(self.device)

    def forced(self, most: int) -> Tensor | None:
        """The tokens [B, most] that guides leave no choice of, -1 behind them; None where there are none."""
        runs = [slot.walk.forced(most) if slot is not None and slot.walk is not None else [] for slot in self.slots]
        if not any(runs):
            return None
        return torch.tensor([run + [-1] * (most - len(run)) for run in runs], device=self.device)
