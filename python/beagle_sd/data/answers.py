"""The target writes answers to prompts, in continuous batches: every answer is the one plain decoding gives."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.data import shards
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.graph import GraphError
from beagle_sd.decoding.many import Many
from beagle_sd.decoding.many import Request as Prompt
from beagle_sd.models.supported import angles_change_at

_PROMPT_TOKENS = 256
"""Room for a prompt in the first rows. Longer prompts wait, and are answered in fewer and longer rows."""


class Request(NamedTuple):
    """A prompt's ids, ready for the assistant's turn; the number it is known by; the temperature of its answers; in a
    chat, the ids between each answer and the next, which begin with the end of a turn."""

    index: int  # type: ignore[assignment]  # tuple.index is not needed
    ids: list[int]
    temperature: float
    later: tuple[list[int], ...] = ()

    def before_last(self, longest: int) -> int:
        """Tokens before its last answer, if those before are of `longest`."""
        return len(self.ids) + sum(longest + len(turn) for turn in self.later)


def requests_of(
    prompts: Iterable[tuple], temperatures: Sequence[float] = (0.0, 0.0, 0.7, 1.0), turn: int = 0
) -> Iterator[Request]:
    """Prompts (index, ids, *later) to be answered: prompt i at temperatures[(i + turn) % len]."""
    for index, ids, *later in prompts:
        yield Request(index, ids, temperatures[(index + turn) % len(temperatures)], tuple(later))


def seed_of(seed: int, request: Request) -> int:
    """The seed of an answer: `generate` with it and the request's temperature writes the same tokens."""
    return (seed << 40) + (request.index << 10) + min(1023, round(100 * request.temperature))


def write_answers(
    model: PreTrainedModel,
    requests: Iterable[Request],
    *,
    ends: Collection[int],
    batch: int = 128,
    max_new_tokens: int = 192,
    context: int = 2048,
    seed: int = 0,
    states: bool = True,
    graph: bool = True,
) -> Iterator[shards.Sequence]:
    """An answer to every request, as it is finished: up to the first of `ends`, max_new_tokens tokens, or so many that
    prompt and answer fill `longest_text(model, context)`. Prompts that leave no room for an answer are skipped. In a
    chat each answer is written after the one before it, whose keys are kept, as long as there is room; all are learnt,
    and the end of a turn where the answer came to it by itself and the template repeats it.

    The same seed gives the same answers in any order and batch, up to the model's rounding. batch: answers at a time,
    to prompts of up to 256 tokens; those to longer ones, a chat counted with all that stands before its last answer,
    are written after them, so many at a time as take no more memory. states: also give those of prompt and answer, in
    bf16 (else they are empty). graph: on a GPU, capture the step as a CUDA graph; where that fails, a warning says why
    and steps run one kernel at a time. Raises ValueError for sizes below 1, RuntimeError where the model gives no
    finite logit.
    """
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("context", context)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: at least 1")
    limit, prompt = longest_text(model, context), _PROMPT_TOKENS
    room = batch * (prompt + max_new_tokens)
    pending: Iterator[Request] = (request for request in requests if len(request.ids) < limit)
    while True:
        longer: list[Request] = []
        slots = min(limit, prompt + max_new_tokens)
        rows = max(1, min(batch, room // slots))
        engine = _engine(model, rows, slots, states, graph)
        writer = _Writer(engine, ends, limit, max_new_tokens, seed)
        yield from writer.run(_up_to(prompt, pending, longer, max_new_tokens))
        del writer, engine  # before the next takes memory
        if not longer:
            return
        while prompt < min(request.before_last(max_new_tokens) for request in longer):
            prompt *= 2
        pending = iter(longer)


def _engine(model: PreTrainedModel, rows: int, slots: int, states: bool, graph: bool) -> Engine:
    """An engine that decodes plainly; one kernel at a time, with a warning, where its rounds cannot be captured."""
    made = functools.partial(Engine, model, None, batch=rows, capacity=slots, return_states=states)
    try:
        return made(graph=None if graph else False)
    except GraphError as error:
        _warn(error)
        return made(graph=False)


def _warn(error: GraphError) -> None:
    warnings.warn(f"the rounds run one kernel at a time: {error}", stacklevel=2)


def longest_text(model: PreTrainedModel, context: int) -> int:
    """Tokens of prompt and answer together: `context`, or if that is less what the model has positions for, or where
    its angles change."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return min(context, positions or context, angles_change_at(config) or context)


def _up_to(tokens: int, requests: Iterator[Request], longer: list[Request], longest: int) -> Iterator[Request]:
    """The requests of up to so many tokens before a last answer of `longest`; the others go to `longer`."""
    for request in requests:
        if request.before_last(longest) <= tokens:
            yield request
        else:
            longer.append(request)


@dataclass
class Text:
    """A request's text as it is written: the ids of its turns so far but for the answer in progress, which of them are
    learnt, and what stands behind that answer and the next ones."""

    request: Request
    ids: list[int]
    learn: list[bool]
    later: list[list[int]]

    def __str__(self) -> str:
        return str(self.request.index)

    @classmethod
    def of(cls, request: Request) -> Text:
        return cls(request, [*request.ids], [False] * len(request.ids), [*request.later])

    def say(self, answer: list[int]) -> None:
        """The answer in progress is there."""
        self.ids += answer
        self.learn += [True] * len(answer)

    def goes_on(self, limit: int) -> bool:
        """Whether another turn follows and leaves room for its answer in a text of `limit` tokens."""
        return bool(self.later) and len(self.ids) + len(self.later[0]) < limit

    def turn(self, ends: Collection[int]) -> None:
        """Put the next turn behind the answer, whose own end of turn, one of `ends`, gives way to the template's."""
        following, said = self.later.pop(0), self.ids[-1]
        ended = said in ends
        if ended:
            del self.ids[-1], self.learn[-1]
        self.learn += [ended and token == said and not place for place, token in enumerate(following)]
        self.ids += following

    def sequence(self, states: Tensor) -> shards.Sequence:
        """The whole text, with the states [n, d] of all tokens but the last, or none."""
        tokens, mask = torch.tensor(self.ids[:-1]), torch.tensor(self.learn[1:])
        return shards.Sequence(tokens, mask, states, self.ids[-1], self.request.index, self.request.temperature)


class _Writer:
    """Answers in the rows of an engine; a finished row takes the next prompt, or goes on with its chat."""

    def __init__(self, engine: Engine, ends: Collection[int], limit: int, longest: int, seed: int):
        self.engine, self.limit, self.longest, self.seed = engine, limit, longest, seed
        self.ends = frozenset(one for one in ends if 0 <= one < engine.target.head.size)

    def run(self, requests: Iterator[Request]) -> Iterator[shards.Sequence]:
        many = Many(self.engine, (self._of(Text.of(request)) for request in requests), [*self.ends], 0)
        while True:
            try:
                answer = next(many)
            except StopIteration:
                return
            except GraphError as error:
                _warn(error)
                self.engine.graph = False
                continue
            text: Text = answer.request.key
            text.say(answer.tokens.tolist())
            if text.goes_on(self.limit):
                text.turn(self.ends)
                many.add(self._of(text))  # its row holds what is written
                continue
            states = answer.kept("states")
            yield text.sequence(torch.empty(0) if states is None else states[: len(text.ids) - 1].to("cpu", copy=True))

    def _of(self, text: Text) -> Prompt:
        """What is asked of the engine for the next answer of a text."""
        request = text.request
        room = min(self.longest, self.limit - len(text.ids))
        seed = seed_of(self.seed, request)
        return Prompt(text.ids, key=text, max_new_tokens=room, temperature=request.temperature, seed=seed)
