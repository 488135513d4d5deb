"""Any number of prompts over a fixed number of rows: a text that ends leaves its row to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from beagle_kernels import Sampling
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import check_engine, checked_target, ends_of
from beagle_sd.decoding.loop import Decoding, Row
from beagle_sd.decoding.prompts import Text
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.settings.on_host import check_processors
from beagle_sd.decoding.settings.rules import RuleArguments, check_names, rules_of
from beagle_sd.decoding.settings.stopping import Stopping
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.target import Target

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Request:
    """A prompt of its own length and how its text is written: as `generate` with one row, the same arguments and seed
    would write it.

    input_ids: the prompt's tokens, a list or a tensor [T] or [1, T]; key: whatever the answer is to be known by, in
    errors too; streamer: is given the prompt, then each round's tokens. The other arguments are generate's.
    """

    def __init__(
        self,
        input_ids: Sequence[int] | Tensor,
        *,
        key: Any = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        **rules: Unpack[RuleArguments],
    ):
        check_names("Request", rules)
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else [*input_ids]
        if len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"input_ids is {str(input_ids)[:80]}; allowed: a list or tensor of one or more tokens")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: at least 1")
        self.ids: list[int] = ids
        self.key, self.max_new_tokens = key, max_new_tokens
        self.sampling = Sampling.of(1, seed, temperature, top_k, top_p, min_p)
        self.streamer, self.stopping_criteria, self.rules = streamer, stopping_criteria, rules

    def text(self, target: Target, ends: Collection[int]) -> Text:
        """As an engine takes it; ValueError for tokens that the target does not have, and rules out of range."""
        vocab_size = target.config.vocab_size
        if wrong := [token for token in self.ids if not 0 <= token < vocab_size]:
            raise ValueError(f"input_ids has {wrong[0]}; allowed: 0 to {vocab_size - 1}")
        target.check_length(len(self.ids), len(self.ids) + self.max_new_tokens)
        rules = rules_of(vocab_size, ends, 1, **self.rules)[0]
        check_processors(rules, self.ids, vocab_size, target.device)
        return Text(self.ids, self.max_new_tokens, self.sampling, rules)


@dataclass
class Answer:
    """A request's new tokens [n] int64; what else the engine has room for (buffers.Kept) of prompt and new tokens is
    had by `kept`, until the next answer is asked for."""

    request: Request
    tokens: Tensor
    kept: Callable[[str], Tensor | None]


class Many(Iterator[Answer]):
    """The answers, each as it is finished; `report` says what became of all so far."""

    def __init__(self, engine: Engine, requests: Iterable[Request], ends: list[int], pad: int):
        self.engine, self.ends, self.pad = engine, ends, pad
        self.later, self.first = iter(requests), deque[Request]()
        self.decoding = Decoding(engine, ends, host_decides=False)
        self.open: dict[int, tuple[Request, Row, Stopping]] = {}
        self.number = 0

    @property
    def report(self) -> Report:
        return self.decoding.report()

    def add(self, request: Request) -> None:
        """Let this be the next to be admitted: where its prompt begins as a text that ended, into that one's row."""
        self.first.append(request)

    def __next__(self) -> Answer:
        try:
            return self._next_answer()
        except StopIteration:
            raise
        except BaseException:  # whoever reads from a streamer would wait for ever
            for request, *_ in self.open.values():
                if request.streamer is not None:
                    with suppress(Exception):
                        request.streamer.end()
            raise

    def _next_answer(self) -> Answer:
        while True:
            for number, (request, row, stopping) in self.open.items():
                stopping.ask()
                if request.streamer is not None and (run := row.take_run()):
                    request.streamer.put(torch.tensor(run))
                if not row.live:
                    del self.open[number]
                    return self._answer(request, row)
            self._admit()
            if not self.open:
                self.engine.settle()
                raise StopIteration
            if self.decoding.live:
                self.decoding.step()

    def _answer(self, request: Request, row: Row) -> Answer:
        if request.streamer is not None:
            request.streamer.end()
        return Answer(request, torch.tensor(row.tokens), lambda name: self.decoding.kept(row, name))

    def _admit(self) -> None:
        free = len(self.decoding.free)
        if free < max(1, self.engine.batch // 16) and self.open:
            return  # to look for one row is to wait for what a GPU has been given
        taken: list[Request] = []
        while len(taken) < free and (request := self._next()) is not None:
            taken.append(request)
        if not taken:
            return
        texts = [request.text(self.engine.target, self.ends) for request in taken]
        keys = [self.number + place if one.key is None else one.key for place, one in enumerate(taken)]
        rows = [Row(text, f"request {key}") for text, key in zip(texts, keys, strict=True)]
        for request, row in zip(taken, rows, strict=True):
            shown = torch.tensor([request.ids])
            device = self.engine.target.device
            stopping = Stopping(request.stopping_criteria, shown.to(device), self.pad, self.decoding, [row])
            self.open[self.number] = request, row, stopping
            self.number += 1
            self.decoding.host_decides |= bool(request.stopping_criteria)
            if request.streamer is not None:
                request.streamer.put(shown)
        self.decoding.admit(rows)

    def _next(self) -> Request | None:
        return self.first.popleft() if self.first else next(self.later, None)


def generate_many(
    target: PreTrainedModel,
    draft: BeagleDraft | None,
    requests: Iterable[Request],
    *,
    batch: int = 8,
    capacity: int | None = None,
    tree: TreeShape | AdaptiveTree | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    graph: bool | None = None,
    page_size: int | None = None,
    engine: Engine | None = None,
) -> Many:
    """Write a text to each request, `batch` at a time: a row whose text has ended takes the next prompt.

    Returns an iterator over Answers, in the order in which they are finished. A request's text does not depend on the
    others, nor on when it came: it is that of `generate` with its arguments. requests may be made as they are asked
    for, if capacity, the most prompt and new tokens a request, is given; None takes what these need. The other
    arguments are generate's, for all requests. Where a row is free for the prompt of which it holds the beginning, as a
    chat's next turn, only the rest is prefilled.

    Raises what generate does: at once for requests that are there, else where a request's turn comes.
    """
    wrapped = checked_target(target)
    options: dict[str, Any] = {
        "tree": tree,
        "graph": graph,
        "page_size": page_size,
        "return_logprobs": return_logprobs,
        "top_logprobs": top_logprobs,
    }
    check_engine(engine, wrapped, draft, options)
    ends, pad = ends_of(wrapped.model, eos_token_id, None)
    if capacity is None and engine is None:
        requests = [*requests]
        for request in requests:
            request.text(wrapped, ends)
        capacity = max((len(request.ids) + request.max_new_tokens for request in requests), default=2)
        batch = max(1, min(batch, len(requests)))
    if engine is None:
        engine = Engine(wrapped.model, draft, batch=batch, capacity=max(2, capacity or 2), **options)
    return Many(engine, requests, ends, pad)
