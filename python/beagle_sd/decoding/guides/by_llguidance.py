"""Guides by llguidance. Imported where one is asked for, as the library need not be installed."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import llguidance
import llguidance.hf
from llguidance import LLMatcher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from beagle_sd.decoding.guides.guide import Guide
from beagle_sd.decoding.guides.vocabulary import Vocabulary, made_once
from beagle_sd.decoding.guides.walk import Walk

_tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, dict] = WeakKeyDictionary()


class LLGuidanceGuide(Guide):
    """A matcher at the beginning, of which every text takes a copy."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: llguidance.LLTokenizer, grammar: str, what: str):
        super().__init__(vocabulary)
        self._words = (tokenizer.vocab_size + 31) // 32
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"llguidance cannot use the {what}: {_reason(self._matcher)}")
        # the library lets these come as text, too, which they would end in its middle
        text_ends = [token for token in vocabulary.ends if not tokenizer.is_special_token(token)]
        self._no_end = ~vocabulary.bits(text_ends) if text_ends else None

    def begin(self) -> Walk:
        return _LLGuidanceWalk(self.vocabulary, self._words, self._matcher.deep_copy(), self._no_end)


class _LLGuidanceWalk(Walk):
    def __init__(self, vocabulary: Vocabulary, words: int, matcher: LLMatcher, no_end: Tensor | None):
        super().__init__(vocabulary, words)
        self._matcher, self._no_end = matcher, no_end

    def _step(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1 or self._refused()

    def _fill(self, mask: Tensor) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._refused()
        if self._no_end is not None and not self._matcher.is_accepting():
            mask[0, : len(self._no_end)] &= self._no_end

    def _roll_back(self, count: int) -> None:
        self._matcher.rollback(count)

    def _refused(self) -> bool:
        """False, for a token that is not allowed; a matcher at its limits stays in error, and masks all."""
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance gave up on the text: {_reason(self._matcher)}")
        return False


def json_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, schema: str, whitespace: bool) -> Guide:
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": whitespace})
    except ValueError as error:
        raise ValueError(f"llguidance cannot use the schema {schema:.200}: {error}") from error
    return _guide(vocabulary, tokenizer, grammar, f"schema {schema:.200}")


def regex_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, pattern: str) -> Guide:
    grammar = LLMatcher.grammar_from_regex(llguidance.regex_to_lark(pattern, "dw"))
    return _guide(vocabulary, tokenizer, grammar, f"pattern {pattern:.200}")


def grammar_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, grammar: str) -> Guide:
    kind: Any = "llguidance" if grammar.lstrip().startswith("{") else "gbnf" if "::=" in grammar else "lark"
    try:
        read = llguidance.grammar_from(kind, grammar)
    except ValueError as error:
        raise ValueError(f"llguidance cannot use the grammar {grammar:.200}: {error}") from error
    return _guide(vocabulary, tokenizer, read, f"grammar {grammar:.200}")


def _guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, grammar: str, what: str) -> Guide:
    def make() -> llguidance.LLTokenizer:
        fast: Any = tokenizer
        size = max(vocabulary.size, len(tokenizer))  # fewer than the tokenizer has are refused
        return llguidance.hf.from_tokenizer(fast, n_vocab=size, eos_token=sorted(vocabulary.ends))

    try:
        made = made_once(_tokenizers, tokenizer, (vocabulary.size, vocabulary.ends), make)
    except ValueError as error:
        raise ValueError(f"llguidance cannot use this tokenizer: {error}") from error
    return LLGuidanceGuide(vocabulary, made, grammar, what)


def _reason(matcher: LLMatcher) -> str:
    """What the library says, without the state that it dumps."""
    return matcher.get_error().split("<state>")[0].strip()
