"""Buffers and the graphs over them, which may outlive a call, and what they tell the host: one news a round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.decoding.buffers import Buffers
from beagle_sd.decoding.graph import RoundGraph, check_capturable
from beagle_sd.decoding.prompts import Prefill, Text
from beagle_sd.decoding.report import Clock
from beagle_sd.decoding.rounds import play_round
from beagle_sd.decoding.settings.shaping import Shaping, Slot
from beagle_sd.decoding.trees.adaptive import AdaptiveTree, checked_tree
from beagle_sd.decoding.trees.tree import PLAIN, TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.pictures import PicturePrompt
from beagle_sd.models.target import Target

_FIRST_TOKENS = 256
"""New tokens a row that there is room for at first, where buffers can grow."""


class Engine:
    """Buffers for `batch` rows of at most `capacity` prompt and new tokens each, and the graphs captured over them.

    The buffers grow with the text, up to `capacity`; graphs keep them where they are, and take all of it at once.
    generate makes one a call; keep one, and give it to generate, to allocate and capture once, and to prefill of a
    prompt that begins as a text it holds only what is new (on CUDA, where several but not all rows begin, of those of
    which half or more is held): it keeps the keys of the last text of each row until `forget`. tree as in generate.
    graph None: on CUDA every round is a graph's replay, on the CPU rounds run eagerly; False: eagerly; True: as on
    CUDA, or GraphError. page_size: the target's cache in pages of so many slots. return_logprobs, top_logprobs,
    return_states: room for them. fixed: on the CPU, too, take the path of a GPU, which reads nothing on the host. One
    call at a time, and the weights must stay as and where they are. The draft is bound to the target.

    `tree` may be replaced between calls by one whose shapes are among those of the tree the engine was made with.

    Raises ValueError for arguments out of range and for a draft that does not fit, TypeError for a tree that is none,
    UnsupportedTarget, and GraphError where a round could not be captured.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: BeagleDraft | None,
        *,
        batch: int,
        capacity: int,
        tree: TreeShape | AdaptiveTree | None = None,
        graph: bool | None = None,
        page_size: int | None = None,
        return_logprobs: bool = False,
        top_logprobs: int = 0,
        return_states: bool = False,
        fixed: bool = False,
    ):
        self.target, self.draft = Target(target), draft
        vocab_size = self.target.config.vocab_size
        for name, value, least, most in (
            ("batch", batch, 1, 1 << 30),
            ("capacity", capacity, 2, 1 << 30),
            ("top_logprobs", top_logprobs, 0, vocab_size),
        ):
            if not least <= value <= most:
                allowed = f"at least {least}" if most == 1 << 30 else f"{least} to {most}"
                raise ValueError(f"{name} is {value}; allowed: {allowed}")
        self.model = self.target.model
        device = self.target.device
        self.graph = device.type == "cuda" if graph is None else graph
        if self.graph:
            check_capturable(device, self.target.dtype)
        if draft is not None:
            draft.bind(target)
        self._draft_vocab = None if draft is None else draft.draft_vocab
        self.batch, self.capacity = batch, capacity
        tree = checked_tree(tree, self.target)
        self.tree = PLAIN if draft is None else tree
        self.shape = self.tree.largest if isinstance(self.tree, AdaptiveTree) else self.tree
        tokens = capacity if self.graph else min(capacity, _FIRST_TOKENS)
        self.buffers = Buffers(
            self.target,
            draft,
            batch,
            tokens,
            self.shape,
            page_size=page_size,
            fixed=fixed,
            logprobs=return_logprobs,
            top=top_logprobs,
            states=return_states,
        )
        self.shaping: Shaping | None = None
        self._prompts = [0] * batch  # tokens of each row's prompt
        self._emitted = [0] * batch
        self._ends = [0] * batch  # of each row, the most tokens that it may have
        self._reusable = [False] * batch  # whether what a row holds is its text alone, whole
        self.live = [False] * batch
        news = self.buffers.news
        self._host = [torch.zeros(news.shape, dtype=news.dtype, pin_memory=news.is_cuda) for _ in range(2)]
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._graphs: dict[TreeShape, RoundGraph] = {}
        self._shaped_graphs: dict[TreeShape, RoundGraph] = {}
        self._pool: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device as they are now, without what graphs keep."""
        return sum(tensor.nbytes for tensor in self.buffers.tensors().values())

    def forget(self) -> None:
        """Prefill the next prompts whole: to be called where the target's weights have changed in place."""
        self._reusable = [False] * self.batch

    def held(self, rows: Sequence[int]) -> list[list[int]]:
        """The texts whose keys some rows hold, by one reading of the device."""
        if not any(self._reusable[row] for row in rows):
            return [[] for _ in rows]
        lengths = self.buffers.cache.lengths.tolist()
        at = torch.tensor(rows, device=self.target.device)
        kept = self.buffers.text[at, : max(lengths[row] for row in rows)].tolist()
        return [text[: lengths[row] * self._reusable[row]] for row, text in zip(rows, kept, strict=True)]

    def common(self, held: Sequence[int], ids: Sequence[int]) -> int:
        """How many of the first tokens of a prompt need no prefill in a row that holds `held`."""
        most = min(len(held), len(ids) - 1)  # what the first new token is chosen by has to be run
        found = next((place for place in range(most) if held[place] != ids[place]), most)
        found = self.buffers.cache.reusable(found, len(held))
        return found if self.buffers.draft_cache is None else self.buffers.draft_cache.reusable(found, len(held))

    def start(self) -> None:
        """Before the texts of a call: none is in progress, whatever became of those of the call before."""
        self.settle()
        self.live = [False] * self.batch
        with _apart(self.target.device):
            self.buffers.live.zero_()
            if self.shaping is not None:
                self.shaping.clear()

    def begin(
        self,
        rows: Sequence[int],
        texts: Sequence[Text],
        ends: list[int],
        clock: Clock,
        pictures: PicturePrompt | None = None,
        *,
        echo: bool = False,
    ) -> int:
        """Prefill new texts in some rows, in ascending order, whose first tokens are news, which is sent; returns how
        many tokens were run. pictures: the same prompts, in all rows, with what is in them beside text. echo: keep what
        the target gave the prompts' tokens, of which then all are run."""
        self._check(texts)
        if pictures is not None and len(rows) != self.batch:
            raise ValueError(
                f"{len(rows)} prompts with pictures were given to an engine for {self.batch} rows; allowed: as many"
            )
        whole = echo or pictures is not None
        held = [[]] * len(rows) if whole else self.held(rows)
        begins = [self.common(*both) for both in zip(held, (text.ids for text in texts), strict=True)]
        if 1 < len(rows) < self.batch and self.buffers.cache.can_take:
            # to run a prompt alone costs more than its first few tokens, as chats of one system prompt have them alike
            begins = [count if 2 * count >= len(text.ids) else 0 for count, text in zip(begins, texts, strict=True)]
        for row, text in zip(rows, texts, strict=True):
            self._prompts[row], self._emitted[row] = len(text.ids), 0
            self._ends[row] = len(text.ids) + text.max_new_tokens
            self._reusable[row] = False  # until it is whole again
            self.live[row] = True
        with _apart(self.target.device), clock.phase("prefill"):
            self._reserve(_FIRST_TOKENS)
            prefill = Prefill(rows, texts, begins, pictures, echo)
            prefill.write(self.buffers)
            self.buffers.set_ends(ends)
            most = max(end for end, live in zip(self._ends, self.live, strict=True) if live)
            self.buffers.cache.end.fill_(most)
            self._set_rules(rows, texts)
            prefill.run(self.target, self.draft, self.buffers, self._shaping)
        for row in rows:
            self._reusable[row] = pictures is None
        self._send()
        return sum(len(text.ids) for text in texts) - sum(begins)

    def _check(self, texts: Sequence[Text]) -> None:
        for text in texts:
            prompt, new = len(text.ids), text.max_new_tokens
            if prompt + new > self.capacity:
                raise ValueError(
                    f"a prompt of {prompt} tokens and max_new_tokens {new} need room for {prompt + new}; "
                    f"allowed: the engine's capacity, {self.capacity}"
                )
        if self.draft is not None and self.draft.draft_vocab is not self._draft_vocab:
            raise ValueError(
                "the draft was given another vocabulary after the engine was made; allowed: an engine made after that"
            )

    def _reserve(self, new: int) -> None:
        """Room for so many new tokens more in each row in progress, as far as it may go on."""
        going = [row for row, live in enumerate(self.live) if live]
        most = max((min(self._prompts[row] + self._emitted[row] + new, self._ends[row]) for row in going), default=0)
        self.buffers.reserve(most, self.capacity)

    def _set_rules(self, rows: Sequence[int], texts: Sequence[Text]) -> None:
        if self.shaping is None and any(text.rules for text in texts):
            self.shaping = Shaping(self.batch, self.target.config.vocab_size, self.target.device)
        if self.shaping is None:
            return
        for row, text in zip(rows, texts, strict=True):
            shown = text.ids if text.shown is None else text.shown
            self.shaping.set(row, Slot.of(text.rules, shown) if text.rules else None)
        if self.shaping.moved:
            self._shaped_graphs.clear()
            self.shaping.moved = False

    def _shaping(self, rows: Sequence[int] | None = None) -> Shaping | None:
        """The rules of some rows that lie together, or of all; None where no text has any."""
        if self.shaping is None or self.shaping.idle:
            return None
        if rows is None or len(rows) == self.batch:
            return self.shaping
        return self.shaping.part(slice(rows[0], rows[-1] + 1))

    @property
    def on_host(self) -> bool:
        """Whether texts have rules that ask the host in each round."""
        return self.shaping is not None and self.shaping.on_host

    @property
    def captures(self) -> bool:
        """Whether rounds are graphs' replays."""
        return self.graph and not self.on_host

    def say(self, row: int, run: list[int]) -> None:
        """Tell a row's rules the tokens that its text has more."""
        slot = None if self.shaping is None else self.shaping.slots[row]
        if slot is not None:
            with _apart(self.target.device):
                slot.say(run)

    def set_gains(self, gains: Sequence[float]) -> None:
        """Let the lookup branch be scored so (Lookup.gains)."""
        with _apart(self.target.device):
            self.buffers.lookup.gains.copy_(torch.tensor(gains), non_blocking=True)

    def play(self, shape: TreeShape, clock: Clock, width: int | None = None) -> None:
        """Start a round, whose news is sent; the graph of a new shape is captured first. width: of the first so many
        rows only, where no graph is replayed."""
        reusable, self._reusable = self._reusable, [False] * self.batch
        with _apart(self.target.device):
            if self.captures:
                if shape not in self._known:
                    with clock.phase("capture"):
                        self._capture(shape)
                self._known[shape].replay()
            else:
                if not self.graph:
                    self._reserve(len(self._sent) * (self.shape.deepest + 1))
                self._round(shape, clock, width)
        self._send()
        self._reusable = reusable

    def end_row(self, row: int) -> None:
        """Let a row go on no further."""
        self.live[row] = False
        with _apart(self.target.device):
            self.buffers.live[row] = False

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        reusable, self._reusable = self._reusable, [False] * self.batch
        with _apart(self.target.device):
            self.buffers.swap(row, other)
            if self.shaping is not None:
                self.shaping.swap(row, other)
        for values in (self._prompts, self._emitted, self._ends, reusable, self.live):
            values[row], values[other] = values[other], values[row]  # type: ignore[call-overload]
        self._reusable = reusable

    def capture(self) -> None:
        """Capture now every graph that rounds may replay and that is not there yet, once the engine has had a text: no
        later call does, but the first with rules, or without, as that text was. Nothing where rounds run eagerly."""
        if not self.captures:
            return
        with _apart(self.target.device):
            for shape in self.tree.shapes if isinstance(self.tree, AdaptiveTree) else [self.tree]:
                if shape not in self._known:
                    self._capture(shape)

    @property
    def _known(self) -> dict[TreeShape, RoundGraph]:
        """The graphs of rounds with or without rules, as the texts at hand have them."""
        return self._graphs if self._shaping() is None else self._shaped_graphs

    def _capture(self, shape: TreeShape) -> None:
        if not self._graphs and not self._shaped_graphs:
            self._pool = None  # that of graphs that are gone cannot be used again while a tensor lies in it
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with self.buffers.at_rest():
                self._known[shape] = RoundGraph(lambda: self._round(shape), self.target.device, self._pool)
        except BaseException:
            self._pool = None  # the next try has one of its own
            raise
        if self.draft is not None:  # it is read even where another call has bound the draft anew
            self._known[shape].reads = self.draft.head

    def _round(self, shape: TreeShape, clock: Clock | None = None, width: int | None = None) -> None:
        some = width is not None and width < self.batch
        buffers = self.buffers.part(slice(0, width)) if some else self.buffers
        shaping = self._shaping(range(width) if some and width is not None else None)
        play_round(self.target, self.draft, buffers, shape, shaping, *([clock.phase] if clock else []))

    def _send(self) -> None:
        """Copy the news to the host, behind what the device has still to do; at most two are on their way."""
        self._host.append(host := self._host.pop(0))
        host.copy_(self.buffers.news, non_blocking=True)
        event = None
        if self.buffers.news.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.target.device))
        self._sent.append((host, event))

    def receive(self) -> list[list[int]]:
        """The oldest news sent and not received, a list a row (see buffers.NEWS). Waits for it."""
        host, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        news = host.tolist()
        self._emitted = [row[1] for row in news]
        self.live = [live and bool(row[2]) for live, row in zip(self.live, news, strict=True)]
        return news

    def settle(self) -> None:
        """Wait for rounds begun whose news nobody received: their memory must not go before they end."""
        for _, event in self._sent:
            if event is not None:
                event.synchronize()
        self._sent.clear()


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Compute as the weights are, whatever is on around the call; streamers and criteria run outside."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
