"""What is done to the target's logits before a token is chosen, and which of transformers' processors say just that."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LogitsProcessorList
from transformers.generation import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass
class Bias:
    """What is done to logits whatever the text says, before temperature and filters.

    added: token -> added to its logit, -inf never gives it; first: token -> the number, from 0, of the first new token
    that may be it. Tokens beyond the vocabulary are ignored.
    """

    added: dict[int, float] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.first)

    @classmethod
    def of(cls, vocab_size: int, logit_bias: Mapping[int, float] | None, ends: Iterable[int], min_new: int) -> Bias:
        """Of generate's arguments; ValueError where they are out of range."""
        if min_new < 0:
            raise ValueError(f"min_new_tokens is {min_new}; allowed: 0 or more")
        bias = cls()
        for token, value in (logit_bias or {}).items():
            bias.add("logit_bias", token, value, vocab_size)
        bias.not_before(ends, min_new)
        return bias

    def add(self, setting: str, token: int, value: float, vocab_size: int) -> None:
        """Add to a token's logit, as `setting` says."""
        if not 0 <= token < vocab_size:
            raise ValueError(f"{setting} has token {token}; allowed: 0 to {vocab_size - 1}")
        if not isinstance(value, numbers.Real) or math.isnan(value) or value == math.inf:
            raise ValueError(f"{setting} gives token {token} {value}; allowed: a finite number, or -inf")
        self.added[int(token)] = self.added.get(token, 0.0) + float(value)

    def not_before(self, tokens: Iterable[int], number: int) -> None:
        """None of these before new token `number`, counted from 0."""
        if number > 0:
            self.first |= {token: max(number, self.first.get(token, 0)) for token in tokens}


_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""In the order in which the kernels, and transformers, apply them."""
_TEXT = "needs the text before each token, of which a tree has many"
_FILTER = "is a filter that the kernels do not have; they have top_k, top_p and min_p"
_REFUSED = {
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty=1.0", _TEXT),
    "EncoderRepetitionPenaltyLogitsProcessor": (
        "encoder_repetition_penalty=1.0",
        "scales logits by a factor; what can be done is to add to them",
    ),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram_size=0", _TEXT),
    "EncoderNoRepeatNGramLogitsProcessor": ("encoder_no_repeat_ngram_size=0", _TEXT),
    "PrefixConstrainedLogitsProcessor": ("prefix_allowed_tokens_fn=None", _TEXT),
    "TypicalLogitsWarper": ("typical_p=1.0", _FILTER),
    "EpsilonLogitsWarper": ("epsilon_cutoff=0.0", _FILTER),
    "EtaLogitsWarper": ("eta_cutoff=0.0", _FILTER),
    "TopHLogitsWarper": ("top_h=None", _FILTER),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": (
        "guidance_scale=1.0",
        "needs a second forward of the target for each node, over another prompt",
    ),
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id=None", "writes a token that the target did not choose"),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id=None", "writes a token that the target did not choose"),
    "InfNanRemoveLogitsProcessor": (
        "remove_invalid_values=False",
        "hides logits that are not finite, which are an error here",
    ),
    "ExponentialDecayLengthPenalty": (
        "exponential_decay_length_penalty=None",
        "adds to a logit in proportion to itself; what can be added is a number of your own",
    ),
    "LogitNormalization": ("renormalize_logits=False", "changes no choice but by its rounding"),
    "SuppressTokensAtBeginLogitsProcessor": (
        "begin_suppress_tokens=None",
        "begins behind the prompt's end; what can be had is its begin_index at the first new token",
    ),
    "WatermarkLogitsProcessor": ("watermarking_config=None", _TEXT),
    "SynthIDTextWatermarkLogitsProcessor": ("watermarking_config=None", _TEXT),
}
"""By the names of their classes, not all of which every version has: how to unset each, and why it is refused."""
_ALLOWED = (
    "allowed: temperature, top_k, top_p and min_p with do_sample, min_new_tokens, min_length, suppress_tokens, "
    "begin_suppress_tokens, bad_words_ids and sequence_bias of one token each"
)


def settings_of(
    processors: LogitsProcessorList, do_sample: bool, width: int, vocab_size: int
) -> tuple[dict[str, Any], Bias]:
    """The sampling settings and the bias that prepared processors stand for, with prompts of padded width `width`.

    ValueError names a processor that stands for anything else, why it cannot be had, and what unsets it.
    """
    sampling: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    bias = Bias()
    reached = -1
    for processor in processors:
        kind = type(processor)
        if kind in _WARPERS:
            step = list(_WARPERS).index(kind)
            _check_warper(processor, do_sample, in_order=step > reached)
            reached, sampling[_WARPERS[kind]] = step, getattr(processor, _WARPERS[kind])
        elif not _taken(processor, bias, width, vocab_size):
            unset, why = _REFUSED.get(kind.__name__, ("", "is not known here, and may need the text before each token"))
            instead = f" (what the model's own generation config sets can be unset in the call, as {unset})"
            raise ValueError(f"{kind.__name__} {why}; {_ALLOWED}{instead if unset else ''}")
        elif reached >= 0:
            raise ValueError(f"{kind.__name__} comes after a filter; allowed: before temperature and filters")
    return sampling, bias


def _check_warper(warper: Any, do_sample: bool, in_order: bool) -> None:
    name = type(warper).__name__
    if not do_sample:
        raise ValueError(f"{name} was given without do_sample; allowed: with do_sample=True, as greedy takes the best")
    if not in_order:
        raise ValueError(f"{name} comes twice or out of order; allowed: once, as {', '.join(_WARPERS.values())}")
    if getattr(warper, "filter_value", -math.inf) != -math.inf or getattr(warper, "min_tokens_to_keep", 1) != 1:
        raise ValueError(f"{name} has a filter_value or min_tokens_to_keep of its own; allowed: -inf and 1")


def _taken(processor: Any, bias: Bias, width: int, vocab_size: int) -> bool:
    """Whether the bias can stand for the processor; it then does."""
    kind = type(processor)
    if kind in (SequenceBiasLogitsProcessor, NoBadWordsLogitsProcessor):
        setting = "bad_words_ids" if kind is NoBadWordsLogitsProcessor else "sequence_bias"
        if longer := [list(tokens) for tokens in processor.sequence_bias if len(tokens) > 1]:
            raise ValueError(f"{setting} has {longer[0]}, which {_TEXT}; allowed: sequences of one token")
        for (token,), value in processor.sequence_bias.items():
            bias.add(setting, token, value, vocab_size)
    elif kind is SuppressTokensLogitsProcessor:
        bias.added |= {token: -math.inf for token in processor.suppress_tokens.tolist()}
    elif kind is SuppressTokensAtBeginLogitsProcessor and processor.begin_index <= width:
        bias.not_before(processor.begin_suppress_tokens.tolist(), processor.begin_index - width + 1)
    elif kind is MinLengthLogitsProcessor:
        bias.not_before(processor.eos_token_id.tolist(), processor.min_length - width)
    elif kind is MinNewTokensLengthLogitsProcessor:
        skipped = processor.prompt_length_to_skip - width
        bias.not_before(processor.eos_token_id.tolist(), processor.min_new_tokens + skipped)
    else:
        return False
    return True
