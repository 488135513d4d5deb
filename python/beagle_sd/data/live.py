"""Training without shards: the target computes the states of token ids while the draft trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.data.batch import Batch
from beagle_sd.data.conversations import Conversation, stored_answers
from beagle_sd.data.dataset import Entry, PackedDataset
from beagle_sd.data.states import target_states
from beagle_sd.models.target import Target


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
        items = list(conversations)
        ids = [torch.tensor(one.ids, dtype=torch.int32) for one in items]
        learn = [torch.tensor(one.learn, dtype=torch.bool) for one in items]
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *ids]),
            torch.cat([torch.empty(0, dtype=torch.bool), *learn]),
            torch.tensor([len(one.ids) for one in items], dtype=torch.int64),
            torch.tensor([one.index for one in items], dtype=torch.int64),
            torch.tensor([one.temperature for one in items], dtype=torch.float32),
        )

    @classmethod
    def of_answers(cls, paths: Sequence[str | Path], tokens: int | None = None) -> Corpus:
        """Of files of answers; only the first so many tokens' worth of them if `tokens` is given."""
        stored = [stored_answers(path) for path in paths]
        kinds: dict[str, type] = {
            "ids": np.int32,
            "lengths": np.int64,
            "learn": np.bool_,
            "index": np.int64,
            "temperature": np.float32,
        }
        parts: dict[str, np.ndarray] = {
            name: np.concatenate([one[name] for one in stored]).astype(kind) for name, kind in kinds.items()
        }
        ends = parts["lengths"].cumsum()
        count = len(ends) if tokens is None else int(np.searchsorted(ends, tokens, side="right"))
        total = int(ends[count - 1]) if count else 0
        lengths, index, temperature = (
            torch.from_numpy(parts[name][:count]) for name in ("lengths", "index", "temperature")
        )
        ids, learn = (torch.from_numpy(parts[name][:total]) for name in ("ids", "learn"))
        return cls(ids, learn, lengths, index, temperature)


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

    def _counts(self, vocab_size: int) -> Tensor:
        return torch.bincount(self.corpus.ids[self.corpus.learn].long(), minlength=vocab_size)

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

    def _compute(self, entries: list[Entry], states: Tensor, starts: list[int]) -> None:
        """Write the sequences' states into `states`, those of each from its start on."""
        sequences = [self.corpus.ids[entry.start : entry.start + self._rows(entry)].long() for entry in entries]
        for which, found in target_states(self.target, sequences):
            rows = [torch.arange(starts[index], starts[index] + len(sequences[index])) for index in which]
            states.index_copy_(0, torch.cat(rows).to(states.device), found)
