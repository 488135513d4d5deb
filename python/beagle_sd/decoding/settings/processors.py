"""What transformers prepares of a call's settings, as the settings of ours that say the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from beagle_sd.decoding.guides.guide import guide_of_processor
from beagle_sd.decoding.settings.rules import Processor, RuleArguments

_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""In the order in which the kernels, and transformers, apply them."""
_OF_BATCH = "keeps something of each row of the batch, and has nodes of trees as rows here"
_REFUSED = {
    "EncoderRepetitionPenaltyLogitsProcessor": ("encoder_repetition_penalty=1.0", _OF_BATCH),
    "EncoderNoRepeatNGramLogitsProcessor": ("encoder_no_repeat_ngram_size=0", _OF_BATCH),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": (
        "guidance_scale=1.0",
        "needs a second forward of the target for each node, over another prompt",
    ),
    "SynthIDTextWatermarkLogitsProcessor": ("watermarking_config=None", _OF_BATCH),
}
"""By the names of their classes, not all of which every version has: how to unset each, and why it is refused."""


def settings_of(
    processors: LogitsProcessorList, do_sample: bool, width: int, vocab_size: int, padding: list[int]
) -> tuple[dict[str, Any], RuleArguments]:
    """The sampling settings and the rules that prepared processors stand for, with prompts of padded width `width`;
    padding: how much of it each has.

    Those for which there is no rule, or that come in another order than rules have, act on the host, and all behind
    them. ValueError names a processor that cannot be had, why, and what unsets it.
    """
    found = _Found(do_sample, width, vocab_size, padding)
    for processor in processors:
        name = type(processor).__name__
        if name in _REFUSED:
            unset, why = _REFUSED[name]
            raise ValueError(
                f"{name} {why}; allowed: processors that are functions of a row's tokens and scores (what the model's "
                f"own generation config sets can be unset in the call, as {unset})"
            )
        found.take(processor)
    return found.sampling, found.rules


@dataclass
class _Found:
    """What the processors so far stand for. host: those that act on the host; warpers: those that the kernels do."""

    do_sample: bool
    width: int
    vocab_size: int
    padding: list[int]
    rules: RuleArguments = field(default_factory=RuleArguments)
    sampling: dict[str, Any] = field(default_factory=dict)
    host: list[Processor] = field(default_factory=list)
    warpers: list[Processor] = field(default_factory=list)

    def __post_init__(self):
        self.sampling["temperature"] = 1.0 if self.do_sample else 0.0

    def take(self, processor: Any) -> None:
        kind = type(processor)
        if kind in _WARPERS and not self.do_sample:
            raise ValueError(
                f"{kind.__name__} was given without do_sample; allowed: with do_sample=True, as greedy takes the best"
            )
        if not self.host and kind in _WARPERS and self._is_next(processor):
            self.warpers.append(processor)
            self.sampling[_WARPERS[kind]] = getattr(processor, _WARPERS[kind])
        elif self.host or self.warpers or not self._is_rule(processor):
            self._to_host(processor)

    def _is_next(self, warper: Any) -> bool:
        """Whether the kernels apply it behind those so far, and just so."""
        order = list(_WARPERS)
        later = all(order.index(type(before)) < order.index(type(warper)) for before in self.warpers)
        own = getattr(warper, "filter_value", -math.inf) != -math.inf or getattr(warper, "min_tokens_to_keep", 1) != 1
        return later and not own

    def _to_host(self, processor: Any) -> None:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            processor = _OfRow(functools.partial(_Allowing, processor._prefix_allowed_tokens_fn))
        elif isinstance(ignored := getattr(processor, "prompt_ignore_length", None), Tensor):
            kind, each = type(processor), ignored.tolist()
            processor = _OfRow(lambda row: kind(processor.penalty, each[row]))
        self.host += [*self.warpers, processor]
        if self.warpers:
            self.warpers, self.sampling = [], {"temperature": 1.0}
        self.rules["logits_processor"] = self.host

    def _is_rule(self, processor: Any) -> bool:
        """Whether a rule stands for the processor; it then does."""
        kind, rules = type(processor), self.rules
        if kind is SequenceBiasLogitsProcessor and "repetition_penalty" not in rules:
            known = {**(rules.get("sequence_bias") or {})}
            for tokens, value in processor.sequence_bias.items():
                known[tokens] = known.get(tokens, 0.0) + value
            rules["sequence_bias"] = known
        elif kind is RepetitionPenaltyLogitsProcessor and self._counts_text(processor):
            rules["repetition_penalty"] = processor.penalty
        elif kind is NoRepeatNGramLogitsProcessor and not any(self.padding) and "no_repeat_ngram_size" not in rules:
            rules["no_repeat_ngram_size"] = processor.ngram_size  # transformers' counts padding
        elif kind is NoBadWordsLogitsProcessor:
            rules["bad_words_ids"] = [*rules.get("bad_words_ids", ()), *processor.sequence_bias]
        elif (guide := guide_of_processor(processor)) is not None and "guide" not in rules:
            rules["guide"] = guide
        else:
            return self._is_number(processor)
        return True

    def _counts_text(self, penalty: RepetitionPenaltyLogitsProcessor) -> bool:
        """Whether the rule, where it is still to be had, counts the tokens that the processor does: all but padding."""
        ignored: Any = penalty.prompt_ignore_length
        passed = ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(self.padding)
        return passed == self.padding and "repetition_penalty" not in self.rules

    def _is_number(self, processor: Any) -> bool:
        """The same for those that look at no text but its length."""
        kind = type(processor)
        if kind is SuppressTokensLogitsProcessor:
            known = [token for token in processor.suppress_tokens.tolist() if 0 <= token < self.vocab_size]
            self.rules["logit_bias"] = {**(self.rules.get("logit_bias") or {}), **dict.fromkeys(known, -math.inf)}
        elif kind is SuppressTokensAtBeginLogitsProcessor and processor.begin_index == self.width:
            self._not_before(processor.begin_suppress_tokens.tolist(), 1)
        elif kind is MinLengthLogitsProcessor:
            self._not_before(processor.eos_token_id.tolist(), processor.min_length - self.width)
        elif kind is MinNewTokensLengthLogitsProcessor:
            skipped = processor.prompt_length_to_skip - self.width
            self._not_before(processor.eos_token_id.tolist(), processor.min_new_tokens + skipped)
        else:
            return False
        return True

    def _not_before(self, tokens: list[int], number: int) -> None:
        known = {**self.rules.get("not_before", {})}
        self.rules["not_before"] = known | {token: max(number, known.get(token, 0)) for token in tokens}


class _OfRow:
    """A processor that is another in each row of the batch (see rules)."""

    def __init__(self, of_row: Callable[[int], Processor]):
        self.of_row = of_row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("a processor that is another in each row was called for none")


class _Allowing:
    """What prefix_allowed_tokens_fn says, which is given a row's number."""

    def __init__(self, allowed: Callable[[int, Tensor], Any], row: int):
        self.allowed, self.row = allowed, row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = torch.full_like(scores, -math.inf)
        for text, before, after in zip(input_ids, scores, made, strict=True):
            if len(tokens := list(self.allowed(self.row, text))) == 0:
                raise ValueError(
                    f"prefix_allowed_tokens_fn allows no token behind {text.tolist()}; allowed: one or more"
                )
            after[tokens] = before[tokens]
        return made
