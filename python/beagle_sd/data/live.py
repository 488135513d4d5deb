"""Training without shards: the target computes the states of token ids while the draft trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.data.conversations import Conversation, stored_answers
from beagle_sd.data.dataset import Entry, PackedDataset, most_frequent
from beagle_sd.models.target import Target
from beagle_sd.training.objective import Batch

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a forward of the target, with padding."""


class Corpus(NamedTuple):
    """Conversations end to end: ids int32 and learn bool [all tokens]; lengths, index int64 and temperature f32, as in
    Conversation, [conversations]."""

    ids: Tensor
    learn: Tensor
    lengths: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not needed
    temperature: Tensor

    @classmethod
    def of(cls, conversations: Iterable[Conversation]) -> Corpus:
        """Of conversations as `read_conversations` gives them."""
        said = list(conversations)
        ids = [torch.tensor(one.ids, dtype=torch.int32) for one in said]
        learn = [torch.tensor(one.learn, dtype=torch.bool) for one in said]
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *ids]),
            torch.cat([torch.empty(0, dtype=torch.bool), *learn]),
            torch.tensor([len(one.ids) for one in said], dtype=torch.int64),
            torch.tensor([one.index for one in said], dtype=torch.int64),
            torch.tensor([one.temperature for one in said], dtype=torch.float32),
        )

    @classmethod
    def of_answers(cls, paths: Sequence[str | Path], tokens: int | None = None) -> Corpus:
        """Of files of answers; only the first so many tokens' worth of them if `tokens` is given."""
        stored = [stored_answers(path) for path in paths]
        kinds = {
            "ids": np.int32,
            "lengths": np.int64,
            "prompt_lengths": np.int64,
            "index": np.int64,
            "temperature": np.float32,
        }
        parts = {name: np.concatenate([one[name] for one in stored]).astype(kind) for name, kind in kinds.items()}
        ends = parts["lengths"].cumsum()
        count = len(ends) if tokens is None else int(np.searchsorted(ends, tokens, side="right"))
        total = int(ends[count - 1]) if count else 0
        lengths, index, temperature = (
            torch.from_numpy(parts[name][:count]) for name in ("lengths", "index", "temperature")
        )
        place = torch.arange(total) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        learn = place >= torch.repeat_interleave(torch.from_numpy(parts["prompt_lengths"][:count]), lengths)
        return cls(torch.from_numpy(parts["ids"][:total]), learn, lengths, index, temperature)

    def frequent_tokens(self, count: int, vocab_size: int) -> Tensor:
        """The `count` most frequent of the tokens to learn, ascending; ties and the rest by lowest id."""
        return most_frequent(torch.bincount(self.ids[self.learn].long(), minlength=vocab_size), count)


class LiveDataset(PackedDataset):
    """The conversations of a corpus, with states that `target` computes: in bf16, as shards hold them.

    keep: compute all of them now and hold them on the target's device, 2 x hidden_size bytes a token; else each
    batch's when it is loaded, again in every epoch. Either way the same arguments give the same states, so that a
    resumed run sees what the first saw.
    """

    def __init__(
        self, target: PreTrainedModel, corpus: Corpus, *, context: int = 2048, held_out: int = 50, keep: bool = False
    ):
        super().__init__(context, held_out)
        self.target, self.corpus = Target(target), corpus
        self.width = self.target.config.hidden_size
        if len(corpus.ids) and int(corpus.ids.max()) >= self.target.config.vocab_size:
            raise ValueError(
                f"the corpus has token {int(corpus.ids.max())}; allowed: below the target's vocabulary "
                f"of {self.target.config.vocab_size}"
            )
        starts = (corpus.lengths.cumsum(0) - corpus.lengths).tolist()
        for index, start, length in zip(corpus.index.tolist(), starts, corpus.lengths.tolist()):
            if length > 1:  # the last token has no next one to predict
                self._add(index, Entry(0, start, length - 1))
        self.states: Tensor | None = None
        if keep:
            every = [*self.train, *self.evaluation]
            self.states = self._empty(len(corpus.ids))
            self._compute(every, self.states, [entry.start for entry in every])

    def load(self, entries: list[Entry]) -> Batch:
        """These sequences as one packed batch; tokens on the CPU, states on the target's device."""
        lengths = torch.tensor([self._rows(entry) for entry in entries])
        ends = lengths.cumsum(0)
        positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)
        rows = torch.repeat_interleave(torch.tensor([entry.start for entry in entries]), lengths) + positions
        if self.states is not None:
            states = self.states[rows.to(self.states.device)]
        else:
            states = self._empty(len(rows))
            self._compute(entries, states, (ends - lengths).tolist())
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
        return Batch(self.corpus.ids[rows].long(), states, self.corpus.learn[rows + 1], cu_seqlens, positions)

    def _empty(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.width, dtype=torch.bfloat16, device=self.target.device)

    @torch.no_grad()
    def _compute(self, entries: list[Entry], states: Tensor, places: list[int]) -> None:
        """Write the sequences' states into `states`, each from its place on; run together by length."""
        room = _BATCH_TOKENS[self.target.device.type]
        order = sorted(range(len(entries)), key=lambda number: -self._rows(entries[number]))
        while order:
            longest = self._rows(entries[order[0]])
            count = max(1, room // longest)
            self._forward([(entries[number], places[number]) for number in order[:count]], longest, states)
            order = order[count:]

    def _forward(self, group: list[tuple[Entry, int]], longest: int, states: Tensor) -> None:
        """One forward over right-padded sequences: causal, so that padding is never seen."""
        device = self.target.device
        lengths = torch.tensor([self._rows(entry) for entry, _ in group])[:, None]
        step = torch.arange(longest)
        inside = step < lengths
        first = torch.tensor([entry.start for entry, _ in group])[:, None]
        tokens = self.corpus.ids[torch.where(inside, first + step, first)].long()
        hidden = self.target.decoder(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        place = torch.tensor([place for _, place in group])[:, None] + step
        states[place[inside].to(device)] = hidden[inside.to(device)].to(torch.bfloat16)
