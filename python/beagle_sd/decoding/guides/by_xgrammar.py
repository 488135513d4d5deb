"""Guides by xgrammar. Imported where one is asked for, as the library need not be installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import xgrammar
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from beagle_sd.decoding.guides.guide import Guide
from beagle_sd.decoding.guides.vocabulary import Vocabulary, made_once
from beagle_sd.decoding.guides.walk import Walk
from beagle_sd.models.ends import token_ids

_compilers: WeakKeyDictionary[PreTrainedTokenizerBase, dict] = WeakKeyDictionary()
_CONTROLS = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
"""All but the ends of lines."""


class XGrammarGuide(Guide):
    """A compiled grammar; its matchers are made with stop tokens of their own where the grammar has others."""

    def __init__(self, vocabulary: Vocabulary, compiled: xgrammar.CompiledGrammar):
        super().__init__(vocabulary)
        self._compiled = compiled

    def begin(self) -> Walk:
        ends = sorted(self.vocabulary.ends)
        return _XGrammarWalk(self.vocabulary, xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=ends))


class _XGrammarWalk(Walk):
    def __init__(self, vocabulary: Vocabulary, matcher: xgrammar.GrammarMatcher):
        super().__init__(vocabulary, vocabulary.words)
        self._matcher = matcher

    def _step(self, token: int) -> bool:
        return self._matcher.accept_token(token)

    def _fill(self, mask: Tensor) -> None:
        # False: nothing is masked, and what the library leaves in the mask then is not said
        if not self._matcher.fill_next_token_bitmask(mask, 0):
            mask.fill_(-1)

    def _roll_back(self, count: int) -> None:
        self._matcher.rollback(count)


def json_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, schema: str, whitespace: bool) -> Guide:
    compiler, controls = _compiler(vocabulary, tokenizer)
    separators = None if whitespace else (",", ":")
    return _guide(
        # JSON forbids them within strings, and the library lets them into those with a minLength or maxLength
        replace(vocabulary, never=vocabulary.never | controls),
        f"schema {schema:.200}",
        lambda: compiler.compile_json_schema(schema, any_whitespace=whitespace, separators=separators),
    )


def regex_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, pattern: str) -> Guide:
    compiler, _ = _compiler(vocabulary, tokenizer)
    return _guide(vocabulary, f"pattern {pattern:.200}", lambda: compiler.compile_regex(pattern))


def grammar_guide(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, grammar: str) -> Guide:
    compiler, _ = _compiler(vocabulary, tokenizer)
    compiled = compiler.compile_grammar if "::=" in grammar else getattr(compiler, "compile_lark", None)
    if compiled is None:
        raise ValueError("xgrammar of this version reads no Lark; allowed: GBNF, a later one, or library='llguidance'")
    return _guide(vocabulary, f"grammar {grammar:.200}", lambda: compiled(grammar))


def compiled_guide(compiled: xgrammar.CompiledGrammar, end_tokens) -> Guide:
    if not isinstance(compiled, xgrammar.CompiledGrammar):
        raise ValueError(f"the grammar is {type(compiled).__name__}; allowed: xgrammar.CompiledGrammar")
    info = compiled.tokenizer_info
    ends = frozenset(info.stop_token_ids if end_tokens is None else token_ids(end_tokens))
    vocabulary = Vocabulary(info.vocab_size, ends, frozenset(info.special_token_ids) - ends)
    return _guide(vocabulary, "compiled grammar", lambda: compiled)


def _compiler(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> tuple[xgrammar.GrammarCompiler, frozenset[int]]:
    """A compiler for these tokens, and those that hold control characters."""

    def make() -> tuple[xgrammar.GrammarCompiler, frozenset[int]]:
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary.size, stop_token_ids=sorted(vocabulary.ends)
        )
        # the last schemas only: a server has as many as requests
        compiler = xgrammar.GrammarCompiler(info, max_threads=torch.get_num_threads(), cache_limit_bytes=64 << 20)
        controls = {token for token, text in enumerate(info.decoded_vocab) if _CONTROLS.search(text)}
        return compiler, frozenset(controls) - vocabulary.ends

    try:
        return made_once(_compilers, tokenizer, (vocabulary.size, vocabulary.ends), make)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"xgrammar cannot use this tokenizer: {_reason(error)}") from error


def _guide(vocabulary: Vocabulary, what: str, compiled: Callable[[], xgrammar.CompiledGrammar]) -> Guide:
    try:
        return XGrammarGuide(vocabulary, compiled())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"xgrammar cannot use the {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the library says, without the place in its sources."""
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip())
