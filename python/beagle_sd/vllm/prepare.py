"""What `beagle-sd prepare --engine vllm` does around the engine: answers first, kept in files, then all states.

The two need two engines, one after the other, so the answers are stored before the first state is there: in the folder
of the shards, in parts, as the .npz files that `prepare` reads. A kill loses the part in progress alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from beagle_sd.data import shards
from beagle_sd.data.answers import Request, Text, seed_of
from beagle_sd.data.conversations import Conversation, read_answers, stored_answers, write_answer_file

_TOKENS_AHEAD = 65536
"""Of the texts asked for: enough for vLLM to fill its forwards, and no more states than this wait in memory."""


class Answers(Protocol):
    """An engine that writes answers (`engine.AnswerEngine`)."""

    def ask(self, name: str, ids: list[int], longest: int, temperature: float, seed: int) -> None: ...
    def step(self) -> list[tuple[str, list[int]]]: ...


class States(Protocol):
    """An engine that gives states (`engine.StateEngine`)."""

    def ask(self, name: str, ids: list[int]) -> None: ...
    def step(self) -> list[tuple[str, Tensor]]: ...


def write_answers(
    engine: Answers,
    requests: Iterable[Request],
    *,
    ends: Collection[int],
    batch: int,
    max_new_tokens: int,
    limit: int,
    seed: int = 0,
) -> Iterator[shards.Sequence]:
    """An answer to every request, as it is finished, without states: what `data.answers.write_answers` writes, but
    that sampled ones are drawn by the engine, from the same law.

    batch: as many are asked for ahead, twice over, so that the engine never waits; limit: tokens of prompt and answer
    together, at most. Each answer of a chat is asked for when the one before it is there.
    """
    waiting = (request for request in requests if len(request.ids) < limit)
    texts: dict[str, Text] = {}

    def ask(text: Text) -> None:
        room, number = min(max_new_tokens, limit - len(text.ids)), text.request.index
        texts[str(number)] = text
        engine.ask(str(number), [*text.ids], room, text.request.temperature, _seed(seed, text))

    while True:
        for request in islice(waiting, max(0, 2 * batch - len(texts))):
            ask(Text.of(request))
        if not texts:
            return
        for name, answer in engine.step():
            text = texts.pop(name)
            text.say(answer)
            if text.goes_on(limit):
                text.turn(ends)
                ask(text)
            else:
                yield text.sequence(torch.empty(0))


def _seed(seed: int, text: Text) -> int:
    """Of the answer in progress: another one in each turn, since some of vLLM's samplers draw from the seed's
    beginning in each."""
    turn = len(text.request.later) - len(text.later)
    return (seed_of(seed, text.request) + (turn << 56)) % 2**63


def sequences_with_states(engine: States, conversations: Iterable[Conversation]) -> Iterator[shards.Sequence]:
    """Conversations with their states, in bf16, as they are there; those of fewer than two tokens teach nothing and
    are left out. RuntimeError where the engine gives other rows than were asked for, or values that are not finite."""
    asked: dict[str, Conversation] = {}
    ahead = 0
    for conversation in conversations:
        count = len(conversation.ids) - 1
        if count < 1:
            continue
        while asked and ahead + count > _TOKENS_AHEAD:
            for sequence in _finished(engine, asked):
                ahead -= len(sequence.tokens)
                yield sequence
        asked[str(conversation.index)] = conversation
        engine.ask(str(conversation.index), conversation.ids[:-1])
        ahead += count
    while asked:
        yield from _finished(engine, asked)


def _finished(engine: States, asked: dict[str, Conversation]) -> Iterator[shards.Sequence]:
    for name, states in engine.step():
        index, ids, learn, temperature = asked.pop(name)
        tokens, mask = torch.tensor(ids[:-1]), torch.tensor(learn[1:])
        if states.dim() != 2 or len(states) != len(tokens):
            raise RuntimeError(f"vLLM gave states {list(states.shape)} for the {len(tokens)} tokens of text {index}")
        if not states.isfinite().all():
            raise RuntimeError(f"text {index}: vLLM gave states that are not finite; check the target's weights, dtype")
        yield shards.Sequence(tokens, mask, states.to(torch.bfloat16), ids[-1], index, temperature)


class Written:
    """Answers in a folder of shards whose states are still to come: files that appear whole or not at all."""

    def __init__(self, folder: str | Path, tokens_per_file: int = 100_000):
        self.folder, self.tokens_per_file = Path(folder), tokens_per_file
        self._open: list[shards.Sequence] = []
        self._tokens = 0

    def add(self, sequence: shards.Sequence) -> None:
        """Take one answer."""
        self._open.append(sequence)
        self._tokens += len(sequence.tokens)
        if self._tokens >= self.tokens_per_file:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as the next file."""
        if not self._open:
            return
        number = 1 + max((int(path.stem.split("-")[1]) for path in shards.written_paths(self.folder)), default=-1)
        write_answer_file(self.folder / f"written-{number:05d}.npz", self._open, {})
        self._open, self._tokens = [], 0

    def indices(self) -> set[int]:
        """Of the prompts that have their answers here. ValueError names a file that is not whole."""
        return {int(index) for path in shards.written_paths(self.folder) for index in stored_answers(path)["index"]}

    def conversations(self, indices: Collection[int]) -> Iterator[Conversation]:
        """The answers to these prompts, file by file."""
        for path in shards.written_paths(self.folder):
            yield from (one for one in read_answers(path, None) if one.index in indices)

    def remove(self, done: Collection[int]) -> None:
        """Remove the files of which every answer is among `done`."""
        for path in shards.written_paths(self.folder):
            if all(int(index) in done for index in stored_answers(path)["index"]):
                path.unlink()
