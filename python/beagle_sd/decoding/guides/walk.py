"""One text's place in a grammar, and masks for the nodes of a draft tree: a library's matcher walked along the tree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from beagle_sd.decoding.guides.vocabulary import Vocabulary


class Walk(ABC):
    """The grammar after the tokens accepted so far; one thread at a time.

    A library's matcher sees no end tokens: what may come behind one matters to nobody, and a matcher that has seen one
    refuses to fill, to accept and, of some versions, to go back.
    """

    def __init__(self, vocabulary: Vocabulary, words: int):
        """words: of a mask as the library fills it, which may know more tokens than the model."""
        self.vocabulary = vocabulary
        self._filled = torch.zeros(1, words, dtype=torch.int32)
        self._here: Tensor | None = None
        self._accepted, self._over = 0, False

    @abstractmethod
    def _step(self, token: int) -> bool:
        """Go on by one token, which is no end token; False where it is not allowed, and nothing has changed then."""

    @abstractmethod
    def _fill(self, mask: Tensor) -> None:
        """Write the bits of the tokens that may come next into mask [1, words]."""

    @abstractmethod
    def _roll_back(self, count: int) -> None:
        """Take the last `count` steps back."""

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token may come, or one came."""
        return self._over or not bool((self._mask() & self.vocabulary.text).any())

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by emitted tokens; what comes behind an end token is passed over. ValueError, and the walk is where it
        was, where the grammar does not allow one."""
        steps = 0
        for number, token in enumerate(tokens):
            if self._over:
                break
            self._over = ends = token in self.vocabulary.ends and _has(self._mask(), token)
            if not ends and not self._try(token):
                self._back(steps)
                self._here = None
                raise ValueError(
                    f"token {token} was emitted as number {self._accepted + number} of the text, counted from 0, where "
                    "the grammar does not allow it; allowed: tokens of the mask"
                )
            steps += not ends
            self._here = self._here if ends else None
        self._accepted += len(tokens)

    def masks(self, paths: Sequence[Sequence[int]], out: Tensor) -> None:
        """Which tokens may follow each path, the tokens below the accepted text, oldest first: bit v % 32 of word
        v // 32 of out's row, int32 [len(paths), W] on the host. All bits are set for a path that the grammar does not
        allow, and for one with an end token."""
        words = self.vocabulary.words
        if out.dtype != torch.int32 or out.device.type != "cpu" or out.dim() != 2:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; allowed: int32 [N, W] on the CPU")
        if len(out) != len(paths) or out.shape[1] < words:
            raise ValueError(f"out is {tuple(out.shape)}; allowed: [{len(paths)}, {words} or more]")
        at: list[int] = []
        closed: list[int] | None = [] if self._over else None
        try:
            # in this order those with a common beginning are neighbours, and each beginning is walked once
            for row in sorted(range(len(paths)), key=lambda index: tuple(paths[index])):
                path = list(paths[row])
                if closed is None or path[: len(closed)] != closed:
                    closed = self._go(at, path)
                if closed is not None:
                    out[row] = -1
                    continue
                self._read(out[row, :words], here=not path)
                out[row, words:] = 0
        finally:
            self._roll_back(len(at))

    def forced(self, most: int) -> list[int]:
        """The tokens that must come next whatever the model says, `most` at most: each the only one of its mask, an end
        token last. Empty where there is a choice."""
        found: list[int] = []
        steps = 0
        mask = self._mask()
        try:
            while not self._over and len(found) < most and (token := _only(mask)) is not None:
                found.append(token)
                if token in self.vocabulary.ends:
                    break
                if not self._try(token):
                    raise RuntimeError(f"the grammar's mask has token {token} alone, and it does not take it")
                steps += 1
                mask = torch.empty_like(mask)
                self._read(mask, here=False)
        finally:
            self._roll_back(steps)
        return found

    def _go(self, at: list[int], path: list[int]) -> list[int] | None:
        """Go from `at`, which follows, to `path`; where that cannot be, the beginning of it that is not allowed."""
        shared = 0
        while shared < min(len(at), len(path)) and at[shared] == path[shared]:
            shared += 1
        self._back(len(at) - shared)
        del at[shared:]
        for token in path[shared:]:
            if not self._try(token):
                return path[: len(at) + 1]
            at.append(token)
        return None

    def _try(self, token: int) -> bool:
        """A step; never by an end token, nor by one that the libraries warn of or take as an error for good."""
        unknown = not 0 <= token < self.vocabulary.size or token in self.vocabulary.never
        return not unknown and token not in self.vocabulary.ends and self._step(token)

    def _back(self, count: int) -> None:
        if count:
            self._roll_back(count)

    def _mask(self) -> Tensor:
        """[words] of the accepted text: read once, whoever asks."""
        if self._here is None:
            mask = torch.empty(self.vocabulary.words, dtype=torch.int32)
            self._read(mask, here=False)
            self._here = mask
        return self._here

    def _read(self, mask: Tensor, here: bool) -> None:
        if here:
            mask.copy_(self._mask())
            return
        self._fill(self._filled)
        # xgrammar sets bits beyond the last token, too
        torch.bitwise_and(self._filled[0, : len(mask)], self.vocabulary.possible, out=mask)


def _has(mask: Tensor, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def _only(mask: Tensor) -> int | None:
    """The one token whose bit is set; None where there are none or several."""
    words = mask.nonzero()
    if len(words) != 1:
        return None
    word = int(words)
    bits = int(mask[word]) & 0xFFFFFFFF
    return None if bits & (bits - 1) else 32 * word + bits.bit_length() - 1
