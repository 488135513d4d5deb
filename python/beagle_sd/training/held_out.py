"""Acceptance on held-out text, as the paper's figure 3 counts it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beagle_sd.data.batch import Batch
from beagle_sd.data.dataset import PackedDataset
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.objective import row_weights
from beagle_sd.training.parallel import of_this_process, summed

_ROWS = 512
"""Rows of logits at a time."""


class HeldOut:
    """The held-out sequences of `dataset` in packs of about tokens_per_pack tokens, about `tokens` tokens in all, and
    the target's first choices, computed once. states: as the trainer's."""

    def __init__(
        self,
        draft: BeagleDraft,
        dataset: PackedDataset,
        states: Callable[..., Tensor],
        *,
        tokens_per_pack: int,
        tokens: int,
    ):
        self.draft, self.dataset, self.states = draft, dataset, states
        self.packs = dataset.evaluation_packs(tokens_per_pack, tokens)
        self._choices: dict[int, Tensor] = {}

    @torch.no_grad()
    def acceptance(self, depth: int) -> list[float]:
        """By depth: the share of windows in which the draft's first choice equals the target's at row m, among those
        where it did at all rows before. The same on every process."""
        device = self.draft.device
        counts = torch.zeros(2, depth, device=device)
        for number, entries in of_this_process(list(enumerate(self.packs))):
            batch = self.dataset.load(entries).to(device)
            if number not in self._choices:
                self._choices[number] = self.target_choices(batch)
            offset = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.int32, device=device)
            states = self.states(self.draft, batch, batch.states, depth, offset, simulated=True)
            counted = row_weights(batch, depth, offset, simulated=False) > 0
            matches = self.agreement(states, self._choices[number], counted)
            for m in range(depth):
                rows = ((batch.positions % depth == m) & counted).nonzero().flatten()
                rows = rows[rows >= m]
                so_far = torch.stack([matches[rows - i] for i in range(m + 1)])
                counts[0, m] += so_far[1:].all(0).sum() if m else len(rows)
                counts[1, m] += so_far.all(0).sum()
        reached, accepted = summed(counts).cpu()
        return [round(value, 4) for value in (accepted / reached.clamp(min=1)).tolist()]

    def target_choices(self, batch: Batch) -> Tensor:
        """[T] int64: the target's first choice over the whole vocabulary in the rows of the loss, elsewhere -1."""
        choices = torch.full_like(batch.tokens, -1)
        head = self.draft.target.head.weight.float()
        for rows in batch.loss_mask.nonzero().flatten().split(_ROWS):
            choices[rows] = (batch.states[rows].float() @ head.T).argmax(-1)
        return choices

    def agreement(self, states: Tensor, choices: Tensor, counted: Tensor) -> Tensor:
        """[T] bool: in the rows of `counted`, the draft's first choice is the target's."""
        matches = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        head = self.draft.head.float()
        for rows in counted.nonzero().flatten().split(_ROWS):
            drafted = (states[rows].float() @ head.T).argmax(-1)
            if self.draft.draft_vocab is not None:
                drafted = self.draft.draft_vocab[drafted]
            matches[rows] = drafted == choices[rows]
        return matches
