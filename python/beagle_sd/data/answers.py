"""The target writes answers to prompts, in continuous batches: every answer is the one plain decoding gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_kernels import STATUS_NO_FINITE, Sampling, choose_tokens
from beagle_sd.data import shards
from beagle_sd.decoding.graph import GraphError, RoundGraph, check_capturable
from beagle_sd.models.cache import causal
from beagle_sd.models.supported import angles_change_at
from beagle_sd.models.target import Target

_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Prompt tokens run together, of prompts of about equal length, so that little is padding."""
_LOOK_EVERY = 4
"""Steps between looks at which rows have ended: looking waits for the device."""
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
    with torch.inference_mode():
        target = Target(model)
        limit, prompt = longest_text(model, context), _PROMPT_TOKENS
        room, captured = batch * (prompt + max_new_tokens), graph and target.device.type == "cuda"
        pending: Iterator[Request] = (request for request in requests if len(request.ids) < limit)
        while True:
            longer: list[Request] = []
            slots = min(limit, prompt + max_new_tokens)
            rows = max(1, min(batch, room // slots))
            writer = _Writer(target, ends, rows, slots, limit, max_new_tokens, seed, states, captured)
            yield from writer.run(_up_to(prompt, pending, longer, max_new_tokens))
            del writer  # before the next takes memory
            if not longer:
                return
            while prompt < min(request.before_last(max_new_tokens) for request in longer):
                prompt *= 2
            pending = iter(longer)


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
    """Rows of one cache, each an answer in progress; a finished row takes the next prompt.

    All that a step reads and writes lives on the device. token [B]: chosen, not yet run; answer [B, longest + 1]: what
    was chosen (the last column takes what ended rows choose); count [B]: how much of it; room [B]: how much of it there
    may be, of at most `longest` tokens, in a text of `limit`; done [B]: ended or free; ends [V] bool: what ends one.
    """

    def __init__(
        self,
        target: Target,
        ends: Collection[int],
        batch: int,
        slots: int,
        limit: int,
        longest: int,
        seed: int,
        states: bool,
        graph: bool,
        fixed: bool = False,
    ):
        device = target.device
        self.target, self.limit, self.longest, self.seed = target, limit, longest, seed
        self.cache = target.new_cache(batch, slots, fixed=fixed)
        vocab = target.head.size
        self.end_ids = frozenset(one for one in ends if 0 <= one < vocab)
        self.ends = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.ends[list(self.end_ids)] = True
        self.sampling = Sampling.of(batch, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.answer = torch.zeros(batch, longest + 1, dtype=torch.int64, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.room = torch.full((batch,), longest, dtype=torch.int64, device=device)
        self.done = torch.ones(batch, dtype=torch.bool, device=device)
        self.status = torch.zeros(batch, dtype=torch.int32, device=device)
        self.numbers = torch.arange(batch, device=device)
        self.depth = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.itself = causal(batch, 1, device)
        shape = (batch, self.cache.capacity, target.config.hidden_size)
        self.states = torch.zeros(shape, dtype=torch.bfloat16, device=device) if states else None
        self.rows: list[Text | None] = [None] * batch
        self.capture, self.play = graph, self._step

    def run(self, requests: Iterator[Request]) -> Iterator[shards.Sequence]:
        exhausted = False
        while True:
            free = [row for row, text in enumerate(self.rows) if text is None]
            if not exhausted and len(free) >= max(1, len(self.rows) // 16):
                taken = list(islice(requests, len(free)))
                exhausted = len(taken) < len(free)
                for part in _groups(taken, _PREFILL_TOKENS[self.target.device.type]):
                    self._admit([free.pop(0) for _ in part], part)
            if all(text is None for text in self.rows):
                return
            if self.capture:
                self.capture, self.play = False, self._captured()
            for _ in range(_LOOK_EVERY):
                self.play()
            yield from self._collect()

    def _admit(self, rows: list[int], requests: list[Request]) -> None:
        device = self.target.device
        longest = max(len(request.ids) for request in requests)
        padded = [request.ids + [0] * (longest - len(request.ids)) for request in requests]
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(request.ids) for request in requests], device=device)
        into = torch.tensor(rows, device=device)
        prompt = self.target.new_cache(*tokens.shape)
        hidden = self.target.prefill(tokens, lengths, prompt)
        self.cache.take(into, prompt)
        if self.states is not None:
            self.states[into, :longest] = hidden.to(torch.bfloat16)
        seeds = [seed_of(self.seed, request) for request in requests]
        self.sampling.seed[into] = torch.tensor(seeds, device=device)
        self.sampling.temperature[into] = torch.tensor([request.temperature for request in requests], device=device)
        self._choose_first(into, hidden[torch.arange(len(rows), device=device), lengths - 1], lengths)
        for row, request in zip(rows, requests, strict=True):
            self.rows[row] = Text.of(request)

    def _go_on(self, row: int, text: Text) -> None:
        """Begin the next answer of a chat, behind the keys of what is written."""
        device = self.target.device
        begin = len(text.ids) - 1  # of what was chosen last, but not run
        text.turn(self.end_ids)
        tokens = torch.tensor([text.ids[begin:]], device=device)
        count = torch.tensor([tokens.shape[1]], device=device)
        hidden = self.target.prefill(tokens, count, self.cache.row(row), begin)
        if self.states is not None:
            self.states[row, begin : len(text.ids)] = hidden[0].to(torch.bfloat16)
        self._choose_first(torch.tensor([row], device=device), hidden[:, -1], begin + count)

    def _choose_first(self, into: Tensor, last: Tensor, lengths: Tensor) -> None:
        """The first tokens of the answers of some rows, by the states [rows, d] before them, and their room."""
        settings = Sampling(*(field[into] for field in self.sampling))
        chosen, status = choose_tokens(self.target.head(last), lengths, settings)
        self.token[into], self.answer[into, 0] = chosen, chosen
        self.count[into], self.status[into] = 1, status
        self.room[into] = (self.limit - lengths).clamp(max=self.longest)
        self.done[into] = self.ends[chosen] | (self.room[into] == 1)

    def _captured(self) -> Callable[[], None]:
        """The step as a graph's replay, captured while no row is live; as it is, with a warning, if it cannot be."""
        device, done = self.target.device, self.done.clone()
        try:
            check_capturable(device, self.target.dtype)
            self.done.fill_(True)
            return RoundGraph(self._step, device, torch.cuda.graph_pool_handle()).replay
        except GraphError as error:
            warnings.warn(f"the step runs one kernel at a time: {error}", stacklevel=2)
            return self._step
        finally:
            self.done.copy_(done)

    def _step(self) -> None:
        """Run the pending tokens and choose the next: no value is read on the host, all buffers stay in place."""
        lengths = self.cache.lengths
        hidden = self.target.forward(self.token[:, None], self.depth, self.itself, self.cache)[:, 0]
        if self.states is not None:
            self.states[self.numbers, lengths.long()] = hidden.to(torch.bfloat16)
        live = ~self.done
        self.cache.advance(live.long())
        chosen, status = choose_tokens(self.target.head(hidden), lengths.long(), self.sampling)
        self.status |= torch.where(live, status, 0)
        self.token.copy_(torch.where(live, chosen, self.token))
        self.answer[self.numbers, torch.where(live, self.count, self.longest)] = chosen
        self.count += live
        self.done |= self.ends[self.token] | (self.count >= self.room)

    def _collect(self) -> Iterator[shards.Sequence]:
        """Take the answers that have ended: chats go on, other texts are given out and free their rows."""
        done = self.done.tolist()
        ended = [(row, text) for row, text in enumerate(self.rows) if text is not None and done[row]]
        if not ended:
            return
        which = torch.tensor([row for row, _ in ended], device=self.done.device)
        answers, counts, status = (part[which].cpu() for part in (self.answer, self.count, self.status))
        for (row, text), answer, count, bits in zip(ended, answers, counts.tolist(), status.tolist(), strict=True):
            request = text.request
            if bits & STATUS_NO_FINITE:
                raise RuntimeError(
                    f"prompt {request.index}: the target gave no finite logit; check its weights and dtype"
                )
            text.say(answer[:count].tolist())
            if text.goes_on(self.limit):
                self._go_on(row, text)
                continue
            before = len(text.ids) - 1
            states = torch.empty(0) if self.states is None else self.states[row, :before].to("cpu", copy=True)
            yield text.sequence(states)
            self.rows[row] = None


def _groups(requests: list[Request], tokens: int) -> Iterator[list[Request]]:
    """The requests by length, in groups of about so many tokens with their padding."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda request: len(request.ids)):
        if group and len(request.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(request)
    if group:
        yield group
