"""Guided decoding: which tokens may follow a text, by a schema, a pattern or a grammar."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.decoding.guides.vocabulary import Vocabulary
from beagle_sd.decoding.guides.walk import Walk

_MODULES = {"xgrammar": "by_xgrammar", "llguidance": "by_llguidance"}
"""By the library's name, in the order in which "auto" asks for them."""


class Guide(ABC):
    """A grammar compiled for a target's tokens, which says what may follow a text. It does not change, and any number
    of texts share it.

    `target` is the model, or the number of tokens it gives logits for; `end_tokens` (one or several) None are those of
    its generation config, or else the tokenizer's: only they may come where the grammar is at its end. library:
    "xgrammar", "llguidance", or "auto", the first of them that is installed and reads such a grammar.

    All constructors raise ValueError with the library's reason for what it cannot use, and ImportError where none is
    installed.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    @property
    def vocab_size(self) -> int:
        """Tokens that the masks cover at most."""
        return self.vocabulary.size

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text here."""
        return self.vocabulary.ends

    @abstractmethod
    def begin(self) -> Walk:
        """A new text's place, before its first token."""

    @staticmethod
    def json(
        target: PreTrainedModel | int,
        tokenizer: PreTrainedTokenizerBase,
        schema: Mapping[str, Any] | str | None = None,
        *,
        whitespace: bool = True,
        library: str = "auto",
        end_tokens: int | Sequence[int] | None = None,
    ) -> Guide:
        """JSON by this schema, a dict or its text; None: any JSON. Without whitespace there is none between tokens of
        JSON, so that more of the text is forced. Of what a schema says, llguidance refuses what it cannot honour;
        xgrammar passes over it, but allows no properties that are not named."""
        text = schema if isinstance(schema, str) else json.dumps({} if schema is None else schema)
        vocabulary = Vocabulary.of(target, tokenizer, end_tokens, special=False)
        return _begun(_by(library).json_guide(vocabulary, tokenizer, text, whitespace))

    @staticmethod
    def regex(
        target: PreTrainedModel | int,
        tokenizer: PreTrainedTokenizerBase,
        pattern: str,
        *,
        library: str = "auto",
        end_tokens: int | Sequence[int] | None = None,
    ) -> Guide:
        r"""Text that as a whole matches the regular expression; \d and \w are those of ASCII."""
        vocabulary = Vocabulary.of(target, tokenizer, end_tokens, special=False)
        return _begun(_by(library).regex_guide(vocabulary, tokenizer, pattern))

    @staticmethod
    def grammar(
        target: PreTrainedModel | int,
        tokenizer: PreTrainedTokenizerBase,
        grammar: str,
        *,
        library: str = "auto",
        end_tokens: int | Sequence[int] | None = None,
    ) -> Guide:
        """Text of a grammar: GBNF (`root ::= ...`), Lark as llguidance has it (`start: ...`), or llguidance's own JSON.
        "auto" takes xgrammar for GBNF, llguidance for the others, where that one is installed."""
        vocabulary = Vocabulary.of(target, tokenizer, end_tokens, special=True)
        order = list(_MODULES) if "::=" in grammar else [*reversed(_MODULES)]
        return _begun(_by(library, order).grammar_guide(vocabulary, tokenizer, grammar))

    @staticmethod
    def compiled(grammar: Any, *, end_tokens: int | Sequence[int] | None = None) -> Guide:
        """Of an xgrammar.CompiledGrammar, with its own tokenizer info, whose vocab_size must be the target's;
        end_tokens None: its stop tokens."""
        return _begun(_by("xgrammar").compiled_guide(grammar, end_tokens))


def guide_of_processor(processor: Any) -> Guide | list[Guide] | None:
    """The guide that says what `xgrammar.contrib.hf.LogitsProcessor` does, or a guide a row where it has several
    grammars; None for any other processor."""
    kind = type(processor)
    if (kind.__module__, kind.__name__) != ("xgrammar.contrib.hf", "LogitsProcessor"):
        return None
    guides = {id(grammar): Guide.compiled(grammar) for grammar in processor.compiled_grammars}
    made = [guides[id(grammar)] for grammar in processor.compiled_grammars]
    return made[0] if len(made) == 1 else made


def _begun(guide: Guide) -> Guide:
    """The guide, once a text of it could begin; libraries see some of their limits only then."""
    mask = torch.empty(1, guide.vocabulary.words, dtype=torch.int32)
    try:
        guide.begin().masks([[]], mask)
    except RuntimeError as error:
        raise ValueError(f"the grammar cannot be used: {error}") from error
    if not bool(mask.any()):
        raise ValueError("no token of the vocabulary can begin a text of the grammar; allowed: a grammar it can write")
    return guide


def _by(library: str, order: Sequence[str] = tuple(_MODULES)) -> ModuleType:
    """The module of a library, or of the first that can be imported."""
    if library not in (*_MODULES, "auto"):
        raise ValueError(f"library is {library!r}; allowed: {', '.join(_MODULES)}, auto")
    reasons = []
    for name in order if library == "auto" else [library]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"pip install {name} ({error})")
            continue
        return importlib.import_module(f"beagle_sd.decoding.guides.{_MODULES[name]}")
    raise ImportError(f"guided decoding needs a library that cannot be imported here: {', or '.join(reasons)}")
