"""Packed training batches: a fixed order for a seed, so that a resumed run sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from beagle_sd.data import shards
from beagle_sd.data.batch import Batch


class Entry(NamedTuple):
    """A sequence: the file's number, its first row there, rows, and where in the file its states begin."""

    file: int
    start: int
    rows: int
    states: int = 0


class PackedDataset:
    """Sequences in packed batches. Subclasses say where they are (`_add`), how wide states are and which tokens they
    teach, and load them.

    Every `held_out`-th sequence (by its index) is kept for evaluation and never trained on.
    """

    width: int
    """The size of the states."""
    window_keys: int | None = None
    """Only the states that a draft with this window uses are there (None: all)."""

    def __init__(self, context: int, held_out: int):
        self.context, self.held_out = context, held_out
        self.train: list[Entry] = []
        self.evaluation: list[Entry] = []

    def _add(self, index: int, entry: Entry) -> None:
        held = self.held_out and index % self.held_out == self.held_out - 1
        (self.evaluation if held else self.train).append(entry)

    def load(self, entries: list[Entry]) -> Batch:
        """These sequences as one packed batch."""
        raise NotImplementedError

    def tokens_of(self, entries: list[Entry]) -> int:
        """Tokens in these sequences, after cutting to the context length."""
        return sum(map(self._rows, entries))

    def epoch(self, epoch: int, tokens_per_batch: int, seed: int) -> list[list[int]]:
        """The training sequences of an epoch in batches of about tokens_per_batch tokens: the same for a seed."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        return _packs(order, [*map(self._rows, self.train)], tokens_per_batch)

    def sample(self, tokens: int, seed: int) -> Batch:
        """About so many tokens of the training sequences, chosen by the seed."""
        return self.load([self.train[number] for number in self.epoch(0, tokens, seed)[0]])

    def evaluation_packs(self, tokens_per_batch: int, tokens: int | None = None) -> list[list[Entry]]:
        """The held-out sequences in batches, as `load` takes them; no further batch from `tokens` tokens on."""
        lengths = [*map(self._rows, self.evaluation)]
        packs, seen = [], 0
        for numbers in _packs(list(range(len(self.evaluation))), lengths, tokens_per_batch):
            if tokens is not None and seen >= tokens:
                break
            packs.append([self.evaluation[number] for number in numbers])
            seen += self.tokens_of(packs[-1])
        return packs

    def frequent_tokens(self, count: int, vocab_size: int) -> Tensor:
        """The `count` most frequent of all tokens to learn, ascending, as int64; ties and the rest by lowest id."""
        if not 1 <= count <= vocab_size:
            raise ValueError(f"draft_vocab is {count}; allowed: 1 to {vocab_size}, or 0 for all")
        counts = self._counts(vocab_size)
        return counts.sort(descending=True, stable=True).indices[:count].sort().values

    def _counts(self, vocab_size: int) -> Tensor:
        """[V] int64: how often each token is to be learnt."""
        raise NotImplementedError

    def _rows(self, entry: Entry) -> int:
        """Rows of a sequence after cutting to the context length."""
        return min(entry.rows, self.context)


class StateDataset(PackedDataset):
    """The sequences of folders of shards, read from disk as they are needed. Of a sequence without all of its states
    each piece that has them is a sequence of its own, its positions from 0: rotary positions are relative."""

    def __init__(self, *folders: str | Path, context: int = 2048, held_out: int = 50):
        super().__init__(context, held_out)
        paths = []
        for folder in folders:
            paths += (found := shards.shard_paths(folder))
            if not found:
                raise shards.ShardError(f"{folder} has no shards: run `beagle-sd prepare` first")
        self._learnt: list[Tensor] = []  # of each file, distinct tokens and how often they are to be learnt
        for number, path in enumerate(paths):
            start, states, learnt = 0, 0, []
            for sequence in shards.read_shard(path, with_states=False):
                for begin, end in _pieces(sequence):
                    self._add(sequence.index, Entry(number, start + begin, end - begin, states))
                    states += end - begin
                start += len(sequence.tokens)
                following = torch.cat([sequence.tokens[1:], torch.tensor([sequence.final_token])])
                learnt.append(following[sequence.loss_mask & (following >= 0)])
            self._learnt.append(torch.stack(torch.unique(torch.cat(learnt), return_counts=True)))
        self._files = [safe_open(path, "pt") for path in paths]
        windows = [shards.read_manifest(folder).get("window_keys") for folder in folders]
        self.window_keys = min((window for window in windows if window), default=None)
        self.width = self._files[0].get_slice("states").get_shape()[1]

    def _counts(self, vocab_size: int) -> Tensor:
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for tokens, times in self._learnt:
            counts.index_add_(0, tokens, times)
        return counts

    def load(self, entries: list[Entry]) -> Batch:
        """Read these sequences into one packed batch."""
        parts: dict[str, list] = {"tokens": [], "states": [], "loss_mask": []}
        lengths = []
        for entry in entries:
            length = self._rows(entry)
            for name, values in parts.items():
                start = entry.states if name == "states" else entry.start
                values.append(self._files[entry.file].get_slice(name)[start : start + length])
            lengths.append(length)
        sizes = torch.tensor([0, *lengths])
        return Batch(
            torch.cat(parts["tokens"]).long(),
            torch.cat(parts["states"]),
            torch.cat(parts["loss_mask"]).bool(),
            sizes.cumsum(0).to(torch.int32),
            torch.cat([torch.arange(length) for length in lengths]),
        )


def _pieces(sequence: shards.Sequence) -> list[tuple[int, int]]:
    """[begin, end) of each run of rows with their states."""
    if sequence.kept is None:
        return [(0, len(sequence.tokens))]
    around = torch.nn.functional.pad(sequence.kept.int(), (1, 1))
    begins, ends = ((around.diff() == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(begins, ends, strict=True))


def _packs(order: list[int], lengths: list[int], tokens_per_batch: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for number in order:
        if not packs or lengths[number] > room:
            packs.append([])
            room = tokens_per_batch
        packs[-1].append(number)
        room -= lengths[number]
    return packs
