"""What a guide knows of the tokens: how many there are, which end a text, and which no grammar may give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.models.ends import end_tokens, token_ids


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens 0 to size - 1; ends: those that end a text; never: those that no grammar gives (padding of the LM head,
    and special tokens where the grammar cannot name them)."""

    size: int
    ends: frozenset[int]
    never: frozenset[int]

    def __post_init__(self):
        if not self.ends:
            raise ValueError("there is no end token, and a guided text ends by one; allowed: end_tokens=...")
        if outside := sorted(token for token in self.ends if not 0 <= token < self.size):
            raise ValueError(f"end token {outside[0]} lies outside the vocabulary; allowed: 0 to {self.size - 1}")

    @classmethod
    def of(
        cls, target: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase, ends: Any, *, special: bool
    ) -> Vocabulary:
        """Of a model, or of as many tokens; ends None: the model's, or else the tokenizer's. special: whether grammars
        may give special tokens."""
        if isinstance(target, int):
            size, own = target, []
        else:
            size, own = target.config.get_text_config().vocab_size, end_tokens(target)
        ending = token_ids(ends) if ends is not None else own or end_tokens(tokenizer=tokenizer)
        never = made_once(_nevers, tokenizer, (size, special), lambda: _never(tokenizer, size, special))
        return cls(size, frozenset(ending), never - frozenset(ending))

    @property
    def words(self) -> int:
        """Words of 32 bits that hold a bit for each token."""
        return (self.size + 31) // 32

    @cached_property
    def possible(self) -> Tensor:
        """[words] int32: bits of the tokens that some grammar may give, none beyond the last token."""
        return ~self.bits(self.never) & self.bits(range(self.size))

    @cached_property
    def text(self) -> Tensor:
        """[words] int32: bits of those that end nothing."""
        return self.possible & ~self.bits(self.ends)

    def bits(self, tokens: Iterable[int]) -> Tensor:
        """[words] int32 with the bits of these tokens, of which those outside are left out."""
        chosen = np.zeros(self.words * 32, dtype=bool)
        chosen[[token for token in tokens if 0 <= token < self.size]] = True
        return torch.from_numpy(np.packbits(chosen, bitorder="little").view("<i4").astype(np.int32))


def _never(tokenizer: PreTrainedTokenizerBase, size: int, special: bool) -> frozenset[int]:
    never = set(range(size)).difference(tokenizer.get_vocab().values())
    if not special:
        # xgrammar takes their names for text: "<|im_start|>" would do within any string of JSON
        never |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(never)


_Made = TypeVar("_Made")
_nevers: WeakKeyDictionary[PreTrainedTokenizerBase, dict] = WeakKeyDictionary()


def made_once(
    kept: WeakKeyDictionary[PreTrainedTokenizerBase, dict],
    tokenizer: PreTrainedTokenizerBase,
    settings: tuple,
    make: Callable[[], _Made],
) -> _Made:
    """What is made of a tokenizer by these settings, which takes up to half a second: kept while the tokenizer lives,
    and made again where it has got more tokens."""
    made = kept.setdefault(tokenizer, {})
    key = (len(tokenizer), *settings)
    if key not in made:
        made[key] = make()
    return made[key]
