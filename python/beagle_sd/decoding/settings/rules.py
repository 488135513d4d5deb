"""What is done to a text's logits before temperature and filters, by its own settings."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from beagle_sd.decoding.guides.guide import Guide

if TYPE_CHECKING:
    from typing_extensions import Unpack

Processor = Callable[[Tensor, Tensor], Tensor]
"""One of transformers' kind: input_ids [n, T], scores [n, V] -> scores."""


@dataclass
class Rules:
    """In the order in which they act, which is transformers'.

    added: token -> added to its logit, -inf never gives it; phrases: tokens -> added to the last one's logit where the
    text ends with those before it; repetition: divides logits above 0, and multiplies those below, of tokens that the
    prompt or the new text has; frequency: taken off for each time that the new text has a token; presence: taken off
    once; first: token -> the number, from 0, of the first new token that may be it; ngram: no run of so many tokens
    comes twice; guide: which tokens may come; processors: asked last, on the host. Tokens beyond the vocabulary are
    ignored.
    """

    added: dict[int, float] = field(default_factory=dict)
    phrases: dict[tuple[int, ...], float] = field(default_factory=dict)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    first: dict[int, int] = field(default_factory=dict)
    ngram: int = 0
    guide: Guide | None = None
    processors: list[Processor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self != Rules()

    @property
    def suppresses(self) -> bool:
        """Whether they may leave a text no token."""
        return bool(self.added or self.phrases or self.first or self.ngram or self.guide or self.processors)

    @property
    def on_host(self) -> bool:
        return bool(self.guide is not None or self.processors)

    def add(self, setting: str, tokens: Sequence[int], value: float, vocab_size: int) -> None:
        """Add to the logit of the last of some tokens behind the others, as `setting` says."""
        if not tokens:
            raise ValueError(f"{setting} has an empty sequence; allowed: a token or more")
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{setting} has token {token}; allowed: 0 to {vocab_size - 1}")
        if not isinstance(value, numbers.Real) or math.isnan(value) or value == math.inf:
            given = tokens[0] if len(tokens) == 1 else list(tokens)
            raise ValueError(f"{setting} gives token {given} {value}; allowed: a finite number, or -inf")
        known: dict = self.added if len(tokens) == 1 else self.phrases
        key = int(tokens[0]) if len(tokens) == 1 else tuple(map(int, tokens))
        known[key] = known.get(key, 0.0) + float(value)

    def not_before(self, tokens: Iterable[int], number: int) -> None:
        """None of these before new token `number`, counted from 0."""
        if number > 0:
            self.first |= {token: max(number, self.first.get(token, 0)) for token in tokens}


class RuleArguments(TypedDict, total=False):
    """Arguments that say what is done to the logits before temperature and filters, in the order in which they act.

    logit_bias: token -> added to its logit, -inf never gives it. sequence_bias: tokens -> added to the last one's logit
    where the text ends with those before it. bad_words_ids: sequences that never come. repetition_penalty divides the
    logits above 0, and multiplies those below, of tokens that stand in the prompt or the new text; frequency_penalty is
    taken off for each time that the new text has a token; presence_penalty once. min_new_tokens: so many come before an
    end token may; not_before: token -> the number, from 0, of the first new token that may be it. no_repeat_ngram_size:
    no run of so many tokens comes twice. guide: which tokens may come (guides.Guide), for all rows or one a row.
    logits_processor: transformers' kind, called on the host with each node of a tree as a row: functions of the row's
    tokens and scores alone.
    """

    logit_bias: Mapping[int, float] | None
    sequence_bias: Mapping[tuple[int, ...], float] | None
    bad_words_ids: Iterable[Sequence[int]]
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_new_tokens: int
    not_before: Mapping[int, int]
    no_repeat_ngram_size: int
    guide: Guide | Sequence[Guide | None] | None
    logits_processor: Sequence[Processor]


def check_names(call: str, rules: Mapping) -> None:
    """TypeError for arguments that `call` does not have."""
    if unknown := [name for name in rules if name not in RuleArguments.__annotations__]:
        raise TypeError(f"{call}() got an unexpected keyword argument {unknown[0]!r}")


def rules_of(vocab_size: int, ends: Collection[int], rows: int, **given: Unpack[RuleArguments]) -> list[Rules]:
    """The rules of each row that these arguments stand for; ValueError where one is out of range."""
    number = functools.partial(_number, given)
    least, ngram = given.get("min_new_tokens", 0), given.get("no_repeat_ngram_size", 0)
    for name, value in (("min_new_tokens", least), ("no_repeat_ngram_size", ngram)):
        if value < 0:
            raise ValueError(f"{name} is {value}; allowed: 0 or more")
    rules = Rules(
        repetition=number("repetition_penalty", 1.0),
        frequency=number("frequency_penalty", 0.0),
        presence=number("presence_penalty", 0.0),
        ngram=ngram,
        processors=[*given.get("logits_processor", ())],
    )
    if rules.repetition <= 0.0:
        raise ValueError(f"repetition_penalty is {rules.repetition}; allowed: above 0, 1 for none")
    for token, added in (given.get("logit_bias") or {}).items():
        rules.add("logit_bias", (token,), added, vocab_size)
    for tokens, added in (given.get("sequence_bias") or {}).items():
        rules.add("sequence_bias", tokens, added, vocab_size)
    for words in given.get("bad_words_ids") or ():
        rules.add("bad_words_ids", words, -math.inf, vocab_size)
    rules.not_before(ends, least)
    for token, first in (given.get("not_before") or {}).items():
        rules.not_before([token], first)
    guides = given.get("guide")
    each = [guides] * rows if guides is None or isinstance(guides, Guide) else [*guides]
    if len(each) != rows:
        raise ValueError(f"{len(each)} guides were given for {rows} rows; allowed: one, or one a row")
    for guide in filter(None, each):
        if not guide.ends.intersection(ends):
            raise ValueError(
                f"the guide ends a text with {sorted(guide.ends)}, and the call's end tokens are {sorted(ends)}; "
                "allowed: a guide whose end_tokens are of these"
            )
    return [replace(rules, guide=one, processors=_of_row(rules.processors, row)) for row, one in enumerate(each)]


def _number(given: RuleArguments, name: str, unset: float) -> float:
    value = given.get(name, unset)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value}; allowed: a finite number, {unset:g} for none")
    return float(value)


def _of_row(processors: list[Processor], row: int) -> list[Processor]:
    """This row's of those that differ from row to row; else the list itself, which rows that have the same share."""
    if not any(hasattr(one, "of_row") for one in processors):
        return processors
    return [one.of_row(row) if hasattr(one, "of_row") else one for one in processors]
