"""Schemas, a reader of masks and an independent account of what a grammar allows, for the tests of guides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from beagle_sd.decoding.guides.guide import Guide
from beagle_sd.decoding.guides.vocabulary import Vocabulary
from beagle_sd.decoding.guides.walk import Walk

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["río", "mountain", "sea"]},
        "name": {"type": "string", "maxLength": 8},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "integer", "minimum": -99, "maximum": 99}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"enum": ["größe", "東京", "🙂", 7, None]}, "minItems": 1, "maxItems": 3},
        "deep": {"type": "boolean"},
    },
    "required": ["kind", "name", "at", "tags", "deep"],
    "additionalProperties": False,
}
TEXT = '{"kind":"río","name":"Zoë 🙂","at":{"x":-1.5e3,"y":42},"tags":["東京",7,"🙂"],"deep":true}'
ENDS = [2, 0]


class ListedGuide(Guide):
    """Allows the texts it lists, whatever their tokens mean: for vocabularies that no tokenizer stands for."""

    def __init__(self, texts: Sequence[Sequence[int]], size: int, ends: Sequence[int], never: Sequence[int] = ()):
        super().__init__(Vocabulary(size, frozenset(ends), frozenset(never)))
        self.texts = [list(text) for text in texts]

    def begin(self) -> ListedWalk:
        return ListedWalk(self)


class ListedWalk(Walk):
    """`calls` has what the matcher was asked to do: a token it was given, or how many it was to take back."""

    def __init__(self, guide: ListedGuide):
        super().__init__(guide.vocabulary, guide.vocabulary.words)
        self.texts, self.taken = guide.texts, []
        self.calls: list[tuple[str, int]] = []

    def _next(self) -> set[int]:
        size = len(self.taken)
        nexts = {text[size] for text in self.texts if len(text) > size and text[:size] == self.taken}
        return nexts | (self.vocabulary.ends if self.taken in self.texts else set())

    def _step(self, token: int) -> bool:
        self.calls.append(("step", token))
        allowed = token in self._next()
        self.taken += [token] * allowed
        return allowed

    def _fill(self, mask: Tensor) -> None:
        self.calls.append(("fill", len(self.taken)))
        # bits beyond the vocabulary, as libraries leave them
        mask[0] = self.vocabulary.bits(self._next()) | ~self.vocabulary.bits(range(self.vocabulary.size))

    def _roll_back(self, count: int) -> None:
        self.calls.append(("back", count))
        assert 0 <= count <= len(self.taken)
        del self.taken[len(self.taken) - count :]


def check_text(text: str) -> None:
    """An AssertionError unless it is JSON by SCHEMA."""
    value = json.loads(text)
    assert list(value) == list(SCHEMA["properties"])
    assert value["kind"] in ("río", "mountain", "sea")
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert set(value["at"]) == {"x", "y"} and isinstance(value["at"]["x"], int | float)
    assert type(value["at"]["y"]) is int and -99 <= value["at"]["y"] <= 99
    assert 1 <= len(value["tags"]) <= 3 and all(tag in ("größe", "東京", "🙂", 7, None) for tag in value["tags"])
    assert isinstance(value["deep"], bool)


def mask_of(walk: Walk, *paths: Sequence[int]) -> Tensor:
    """[paths or 1, W] int32: what may follow the paths, by default what may come next."""
    words = walk.vocabulary.words
    out = torch.full((max(len(paths), 1), words), 0x5A5A5A5A, dtype=torch.int32)
    walk.masks(paths or [[]], out)
    return out


def tokens_of(mask: Tensor) -> list[int]:
    """The tokens whose bits are set in one row, by the definition: bit v % 32 of word v // 32."""
    token = torch.arange(32 * len(mask))
    return token[(mask[token // 32] >> token % 32 & 1).bool()].tolist()


def fresh_walk(guide: Guide, tokens: Sequence[int]) -> Walk | None:
    """A walk of its own that took these tokens one by one, asked for nothing between; None if one was refused."""
    walk = guide.begin()
    try:
        for token in tokens:
            walk.accept([token])
    except ValueError:
        return None
    return walk


def random_paths(guide: Guide, accepted: Sequence[int], count: int, rng: random.Random, wild: float) -> list[list[int]]:
    """The nodes of a random tree below the accepted tokens, the root among them; `wild`: how often a token is drawn
    from the whole vocabulary and beyond it."""
    paths: list[list[int]] = [[]]
    while len(paths) < count:
        path = list(rng.choice(paths))
        walk = fresh_walk(guide, [*accepted, *path])
        allowed = tokens_of(mask_of(walk)[0]) if walk is not None else []
        if rng.random() < wild or not allowed:
            path.append(rng.randrange(-1, guide.vocab_size + 2))
        else:
            path.append(rng.choice(allowed))
        if path not in paths:
            paths.append(path)
    rng.shuffle(paths)
    return paths


def plain_text(
    guide: Guide, tokenizer: PreTrainedTokenizerBase, choose: Callable[[list[int]], int], most: int
) -> list[int]:
    """Plain decoding, masked: `choose` takes one of the tokens of each mask, until an end token or `most` tokens."""
    walk, tokens = guide.begin(), []
    while len(tokens) < most:
        tokens.append(choose(tokens_of(mask_of(walk)[0])))
        walk.accept(tokens[-1:])
        if tokens[-1] in guide.ends:
            return tokens
    raise AssertionError(f"no end in {most} tokens: {tokenizer.decode(tokens)}")
