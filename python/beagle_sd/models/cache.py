"""What a target keeps of a text, in fixed buffers: keys and values, dense or in pages, and recurrent states."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from beagle_sd.models.head import UnsupportedTarget
from beagle_sd.models.layers.attention import Attended, Span
from beagle_sd.models.layers.kept import Kept
from beagle_sd.models.layers.recurrent import Recurrence

AT_ONCE = 512
"""Tokens of a prompt that a forward takes."""
_Made = TypeVar("_Made")


class TreeCache(Cache):
    """Keys and values of B rows, ragged, with tree nodes at the end of each; `lengths` [B] int32; `offsets` [B] int64,
    what the position of a row's next token is beside its length: not 0 only behind pictures (pictures.py); `end` []
    int64: no row goes on to this position.

    Layers of equal shape lie together, so that one launch moves them all: each tensor of `states` is
    [layers, 2, B, Hkv, S, D], keys before values, or where these differ in width two tensors [layers, 1, B, Hkv, S, D].
    With page_size they are pages [layers, planes, P, Hkv, page, D] of which row b's slot s is in page
    table[b, s // page], `tables` having one for each span of layers. Slot j of row b holds position j for
    j < lengths[b]. Layers that see a window keep all of it where the cache is dense; of pages they take turns with as
    many as the window and `at_once` new tokens need. A forward over N new tokens writes slots lengths[b] ..
    lengths[b] + N - 1 and leaves `lengths` as they are: the caller says by `advance` what was accepted. `recurrences`
    has the states of recurrent layers by their number; a forward takes them on over all N tokens, and `advance` back.
    `fixed`: a forward reads nothing on the host, and its shapes follow from N alone (so on a GPU, and with pages); else
    the longest row bounds what it reads.
    """

    stepping = recording = False

    def __init__(
        self,
        kept: Sequence[Kept],
        batch: int,
        slots: int,
        device,
        *,
        page_size: int | None = None,
        at_once: int = AT_ONCE,
        fixed: bool = False,
    ):
        self.kept = tuple(kept)
        self.recurrences = {
            index: Recurrence(one.recurrence, batch) for index, one in enumerate(kept) if one.recurrence is not None
        }
        super().__init__(
            layers=[
                self.recurrences[index].layer if index in self.recurrences else DynamicLayer()
                for index in range(len(self.kept))
            ]
        )
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.end = torch.full((), 1 << 40, dtype=torch.int64, device=device)
        self.offsets = torch.zeros(batch, dtype=torch.int64, device=device)
        self.fixed = fixed or page_size is not None or self.lengths.is_cuda
        self.capacity, self.page_size, self.at_once = 0, page_size, at_once
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size is {page_size}; allowed: 1 or more slots")
        self.attended: dict[int, Attended] = {}  # by the attention's id; one object for the cache and its rows
        self.tables: dict[Span, Tensor] = {}
        self.states: list[Tensor] = []
        self.spans: list[Span] = []
        self._places: dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = {}
        self._lay_out(batch if page_size is None else 0, 0 if page_size is None else page_size)
        self.reserve(slots)
        self.depth = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._slots = self._rows
        self._spans_of_rows: list[tuple[int, int]] = []  # the slots that a row's new tokens take
        self._limit: int | None = None
        self._made: dict[Hashable, Any] = {}
        self.ends: Tensor | None = None  # of the prompts whose tokens a forward is over
        self.passed: Any = None  # what the last of whole layers gave, and to whom (layers/whole.py)

    def _lay_out(self, rows: int, size: int) -> None:
        """`states` without slots, the span of each, and of each layer the (tensor, layer in it, plane) of its keys and
        of its values. Layers of different spans lie together where nothing depends on it."""
        groups: dict[tuple, list[int]] = {}
        for index, one in enumerate(self.kept):
            if one.heads:
                span = one.span if self.page_size is not None else Span()
                groups.setdefault((span, one.heads, one.key_width, one.value_width, one.dtype), []).append(index)
        for (span, heads, *widths, dtype), members in groups.items():
            alike = widths[0] == widths[1]
            for width in widths[:1] if alike else widths:
                shape = len(members), 2 if alike else 1, rows, heads, size, width
                self.states.append(torch.zeros(shape, dtype=dtype, device=self.lengths.device))
                self.spans.append(span)
            last = len(self.states) - 1
            for at, index in enumerate(members):
                self._places[index] = ((last, at, 0), (last, at, 1)) if alike else ((last - 1, at, 0), (last, at, 0))

    def reserve(self, slots: int) -> None:
        """Make room for `slots` positions a row at least, behind what is there: `states` and `tables` may move."""
        if slots <= self.capacity:
            return
        self.capacity = slots
        if self.page_size is None:
            self.states = [grown(states, 4, slots) for states in self.states]
            return
        batch, pages = len(self.lengths), torch.arange(-(-slots // self.page_size), device=self.lengths.device)
        rows = torch.arange(batch, device=self.lengths.device)[:, None]
        turns = {span: min(len(pages), self._turns(span)) for span in {Span(), *self.spans}}
        self.tables = {span: (pages % turn * batch + rows).to(torch.int32) for span, turn in turns.items()}
        self.states = [
            grown(states, 2, batch * turns[span]) for states, span in zip(self.states, self.spans, strict=True)
        ]

    def _turns(self, span: Span) -> int:
        """Pages of a row that layers of this span take turns with: none of them is written over while it is seen."""
        reach = span.window or span.chunk
        return 1 << 40 if reach is None else -(-(reach + self.at_once) // (self.page_size or 1)) + 1

    @property
    def can_take(self) -> bool:
        """Whether prompts may be run in another cache, whose rows this one takes."""
        return self.fixed and self.page_size is None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and recurrent states."""
        states = [*self.states, *(state for one in self.recurrences.values() for state in one.states)]
        return sum(state.nbytes for state in states)

    def keeps(self, index: int) -> bool:
        """Whether a layer has keys and values here."""
        return index in self._places

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer: [B, Hkv, S, D] and [B, Hkv, S, Dv], or pages."""
        keys, values = ((self.states[tensor][at, plane]) for tensor, at, plane in self._places[index])
        return keys, values

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        found = {f"states_{number}": states for number, states in enumerate(self.states)}
        found |= {"lengths": self.lengths, "offsets": self.offsets, "end": self.end}
        for index, recurrence in self.recurrences.items():
            found |= {f"recurrence_{index}_{number}": state for number, state in enumerate(recurrence.states)}
        return found | {f"table_{number}": table for number, table in enumerate(self.tables.values())}

    def part(self, rows: slice) -> TreeCache:
        """Some rows as a cache of their own, in the same memory, until `reserve` moves it."""
        one = copy(self)
        one.lengths, one.offsets, one._made = self.lengths[rows], self.offsets[rows], {}
        one._rows = self._rows[: len(one.lengths)]
        if self.page_size is None:
            one.states = [states[:, :, rows] for states in self.states]
        one.tables = {span: table[rows] for span, table in self.tables.items()}
        one.recurrences = {index: recurrence.part(rows) for index, recurrence in self.recurrences.items()}
        one.layers = [
            one.recurrences[index].layer if index in one.recurrences else layer
            for index, layer in enumerate(self.layers)
        ]
        return one

    def forget(self) -> None:
        """As before any text."""
        self.lengths.zero_()
        self.offsets.zero_()
        for recurrence in self.recurrences.values():
            recurrence.forget()

    def take(self, rows: Tensor, other: TreeCache) -> None:
        """Take all rows of another dense cache, with the same layers and no more slots, as `rows` [n] int64."""
        for states, new in zip(self.states, other.states, strict=True):
            states[:, :, rows, :, : other.capacity] = new
        for index, recurrence in self.recurrences.items():
            for state, new in zip(recurrence.states, other.recurrences[index].states, strict=True):
                state[rows] = new
        self.lengths[rows], self.offsets[rows] = other.lengths, other.offsets

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        pair, turned = torch.tensor([[row, other], [other, row]], device=self.lengths.device)
        longest = self.capacity if self.fixed else int(self.lengths[pair].max())
        if self.page_size is None:
            for states in self.states:
                states[:, :, pair, :, :longest] = states[:, :, turned, :, :longest]
        kept = [self.lengths, self.offsets, *self.tables.values()]
        for state in [*kept, *(state for one in self.recurrences.values() for state in one.states)]:
            state[pair] = state[turned]

    def reusable(self, common: int, held: int) -> int:
        """How many of the first `common` tokens of a row, which holds `held`, need not be run again for a text that
        goes on otherwise behind them: recurrent states follow one text, and pages that take turns are written over."""
        if common == held:
            return common
        wrapped = any(
            self._turns(span) * (self.page_size or 0) < held + self.at_once for span in self.tables if span != Span()
        )
        return 0 if self.recurrences or wrapped else common

    def expect(self, depth: Tensor, limit: int | None, *, stepping: bool, ends: Tensor | None) -> None:
        """Prepare for a forward over new tokens at `depth` [B, N] behind the lengths, which is to be given `limit`
        slots (None: all). stepping: recurrent layers go token by token. ends [B]: the tokens are part of prompts that
        end there, of which nothing is taken back, and those behind are padding."""
        count = depth.shape[1]
        if (limit or count) > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots a row; {limit or count} are needed")
        if self.page_size is not None and count > self.at_once:
            raise ValueError(f"a forward over {count} new tokens; allowed: {self.at_once}, as its pages were made for")
        self._limit, self.depth = limit, depth.long()
        self.stepping, self.recording = stepping, ends is None
        self._made.clear()
        self.passed, self.ends = None, None if ends is None else ends.to(torch.int32)
        for recurrence in self.recurrences.values():
            recurrence.history = []
        if not self.fixed:
            starts = self.lengths.tolist()
            stops = [start + count for start in starts] if ends is None else ends.tolist()
            self._spans_of_rows = [(start, min(start + count, stop)) for start, stop in zip(starts, stops, strict=True)]
            return
        self._slots = self.lengths.long()[:, None] + torch.arange(count, device=self.lengths.device)
        if ends is not None:  # padding must not take a turn with what is seen
            self._slots = torch.minimum(self._slots, ends.long()[:, None])

    def _at(self, span: Span) -> tuple[Tensor, Tensor]:
        """Where the new tokens' keys go: rows or pages, and slots in them, [B, N] each."""
        if self.page_size is None:
            return self._rows, self._slots
        return self.tables[span].gather(1, self._slots // self.page_size).long(), self._slots % self.page_size

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write [B, Hkv, N, D] new keys and values; return the layer's first `limit` slots, or all its pages."""
        if layer_idx not in self._places:
            raise UnsupportedTarget(
                f"layer {layer_idx} keeps keys where its first token had none; allowed: layers that keep the same of "
                "every token"
            )
        keys, values = self.layer(layer_idx)
        for name, new, buffer in (("keys", key_states, keys), ("values", value_states, values)):
            if (new.shape[1], new.shape[3]) != (buffer.shape[1], buffer.shape[3]):
                raise UnsupportedTarget(
                    f"layer {layer_idx} gives {new.shape[1]} heads of {new.shape[3]} {name}; allowed: "
                    f"{buffer.shape[1]} of {buffer.shape[3]}, as of its first token"
                )
        if self.fixed:
            span = self.spans[self._places[layer_idx][0][0]]
            rows, slots = self.once(("at", span), lambda: self._at(span))
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        else:  # index_put_ would wake PyTorch's threads, which then spin where a CPU's linear layers want to run
            for row, (start, end) in enumerate(self._spans_of_rows):
                keys[row, :, start:end] = key_states[row, :, : end - start]
                values[row, :, start:end] = value_states[row, :, : end - start]
        if self._limit is None:
            return keys, values
        return keys[:, :, : self._limit], values[:, :, : self._limit]

    def advance(self, taken: Tensor) -> None:
        """Let `taken` [B] int64 of the tokens of the last forward be part of the rows from here on."""
        self.lengths += taken
        for recurrence in self.recurrences.values():
            recurrence.keep(taken)

    def span_of(self, index: int | None, window: int | None) -> Span:
        """How far back layer `index` sees: as its own cache has it, or `window` where it has none, since it reads
        another layer's."""
        if index is not None and 0 <= index < len(self.kept) and self.kept[index].heads:
            return self.kept[index].span
        return Span(window)

    def table(self, span: Span) -> Tensor | None:
        """The table of pages of layers that see so far back; None where the cache is dense."""
        return self.tables[span] if self.tables else None

    def once(self, name: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made once a forward."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's length; where the host must not ask the device, what bounds it."""
        return self.capacity if self.fixed else int(self.lengths.max())


def grown(values: Tensor, dim: int, size: int) -> Tensor:
    """The values, followed by zeros up to `size` along `dim`."""
    if values.shape[dim] == size:
        return values
    shape = list(values.shape)
    shape[dim] = size - shape[dim]
    more = values.new_zeros(shape)
    return torch.cat((values, more), dim) if values.numel() else more


def causal(batch: int, count: int, device: torch.device) -> Tensor:
    """Mask words [B, N, W] int64: each of N new tokens sees itself and those before it."""
    node = torch.arange(count, device=device)
    ones = node[:, None] + 1 - 64 * node[: (count + 63) // 64]
    words = torch.where(ones >= 64, -1, (1 << ones.clamp(0, 63)) - 1)
    return words.expand(batch, -1, -1)
