"""Buffers and the graphs over them, which may outlive a call, and what they tell the host: one news a round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_kernels import Sampling
from beagle_sd.decoding.adaptive import AdaptiveTree
from beagle_sd.decoding.graph import RoundGraph, check_capturable
from beagle_sd.decoding.logits import Bias
from beagle_sd.decoding.report import Clock
from beagle_sd.decoding.rounds import Buffers, play_round, prefill
from beagle_sd.decoding.tree import PLAIN, TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.head import UnsupportedTarget
from beagle_sd.models.pictures import PicturePrompt
from beagle_sd.models.target import Target

_FIRST_TOKENS = 256
"""New tokens a row that there is room for at first, where buffers can grow."""


class Engine:
    """Buffers for `batch` rows of at most `capacity` prompt and new tokens each, and the graphs captured over them.

    The buffers grow with the text, up to `capacity`; graphs keep them where they are, and take all of it at once.
    generate makes one a call; keep one, and give it to generate, to allocate and capture once. tree as in generate.
    graph None: on CUDA every round is a graph's replay, on the CPU rounds run eagerly; False: eagerly; True: as on
    CUDA, or GraphError. page_size: the target's cache in pages of so many slots. return_logprobs: room for them. fixed:
    on the CPU, too, take the path of a GPU, which reads nothing on the host. One call at a time, and the weights must
    stay as and where they are. The draft is bound to the target.

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
        fixed: bool = False,
    ):
        for name, value, least in (("batch", batch, 1), ("capacity", capacity, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}; allowed: at least {least}")
        self.target, self.draft = Target(target), draft
        self.model = self.target.model
        device = self.target.device
        self.graph = device.type == "cuda" if graph is None else graph
        if self.graph:
            check_capturable(device, self.target.dtype)
        # graphs read this head even where another call has bound the draft anew
        self._head = draft.bind(target).head if draft is not None else None
        self._draft_vocab = None if draft is None else draft.draft_vocab
        self.batch, self.capacity = batch, capacity
        tree = _checked(tree, self.target)
        self.tree = PLAIN if draft is None else tree
        self.shape = self.tree.largest if isinstance(self.tree, AdaptiveTree) else self.tree
        tokens = capacity if self.graph else min(capacity, _FIRST_TOKENS)
        self.buffers = Buffers(
            self.target, draft, batch, tokens, self.shape, page_size=page_size, fixed=fixed, logprobs=return_logprobs
        )
        self._longest = self._emitted = 0
        news = self.buffers.news
        self._host = [torch.zeros(news.shape, dtype=news.dtype, pin_memory=news.is_cuda) for _ in range(2)]
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._graphs: dict[TreeShape, RoundGraph] = {}
        self._biased_graphs: dict[TreeShape, RoundGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graph else None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device as they are now, without what graphs keep."""
        return sum(tensor.nbytes for tensor in self.buffers.tensors().values())

    def begin(
        self,
        prompts: Tensor,
        lengths: Tensor,
        sampling: Sampling,
        max_new_tokens: int,
        ends: list[int],
        clock: Clock,
        bias: Bias | None = None,
        pictures: PicturePrompt | None = None,
    ) -> None:
        """Prefill new texts, whose first news is sent: prompts [B, T] padded on the right, lengths [B] int32;
        pictures: the same prompts with what is in them beside text."""
        batch, longest = prompts.shape
        if batch != self.batch:
            raise ValueError(f"{batch} rows were given to an engine for {self.batch}; allowed: as many rows")
        if longest + max_new_tokens > self.capacity:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} need room for "
                f"{longest + max_new_tokens}; allowed: the engine's capacity, {self.capacity}"
            )
        if self.draft is not None and self.draft.draft_vocab is not self._draft_vocab:
            raise ValueError(
                "the draft was given another vocabulary after the engine was made; allowed: an engine made after that"
            )
        self._sent.clear()
        self._longest, self._emitted = longest, 0
        self.buffers.reserve(longest + min(max_new_tokens, _FIRST_TOKENS), self.capacity)
        self.buffers.cache.end.fill_(longest + max_new_tokens)
        self.buffers.begin(sampling, max_new_tokens, ends, bias)
        with _apart(self.target.device), clock.phase("prefill"):
            prefill(self.target, self.draft, prompts, lengths, self.buffers, pictures)
        self._send()

    def play(self, shape: TreeShape, clock: Clock) -> None:
        """Start a round, whose news is sent; the graph of a new shape is captured first."""
        with _apart(self.target.device):
            if self.graph:
                if shape not in self._known:
                    with clock.phase("capture"):
                        self._capture(shape)
                self._known[shape].replay()
            else:
                most = self._emitted + len(self._sent) * (self.shape.depth + 1)  # new tokens when this round begins
                self.buffers.reserve(min(self._longest + most, self.capacity), self.capacity)
                self._round(shape, clock)
        self._send()

    def end_row(self, row: int) -> None:
        """Let a row go on no further."""
        with _apart(self.target.device):
            self.buffers.live[row] = False

    def capture(self) -> None:
        """Capture now every graph that rounds may replay and that is not there yet, once the engine has had a text: no
        later call does, but the first with a bias, or without one, as that text was. Nothing where rounds run
        eagerly."""
        if not self.graph:
            return
        with _apart(self.target.device):
            for shape in self.tree.shapes if isinstance(self.tree, AdaptiveTree) else [self.tree]:
                if shape not in self._known:
                    self._capture(shape)

    @property
    def _known(self) -> dict[TreeShape, RoundGraph]:
        """The graphs of rounds with or without a bias, as the text at hand has one."""
        return self._biased_graphs if self.buffers.biased else self._graphs

    def _capture(self, shape: TreeShape) -> None:
        try:
            with self.buffers.at_rest():
                self._known[shape] = RoundGraph(lambda: self._round(shape), self.target.device, self._pool)
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()  # the next try has one of its own
            raise

    def _round(self, shape: TreeShape, clock: Clock | None = None) -> None:
        play_round(self.target, self.draft, self.buffers, shape, *([clock.phase] if clock else []))

    def _send(self) -> None:
        """Copy the news to the host, behind what the device has still to do; at most two are on their way."""
        self._host.append(host := self._host.pop(0))
        host.copy_(self.buffers.news, non_blocking=True)
        event = None
        if self.buffers.news.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._sent.append((host, event))

    def receive(self) -> list[list[int]]:
        """The oldest news sent and not received, a list a row (see rounds.NEWS). Waits for it."""
        host, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        news = host.tolist()
        self._emitted = max(row[1] for row in news)
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


def _checked(tree: TreeShape | AdaptiveTree | None, target: Target) -> TreeShape | AdaptiveTree:
    chains = target.chains_only
    if tree is None:
        return TreeShape.default(target.device, chain=chains is not None)
    if not isinstance(tree, TreeShape | AdaptiveTree):
        raise TypeError(f"tree is {tree!r}; allowed: a TreeShape, an AdaptiveTree or None, the device's default")
    shapes = tree.shapes if isinstance(tree, AdaptiveTree) else [tree]
    if chains and (wide := [shape for shape in shapes if shape.branch > 1]):
        raise UnsupportedTarget(
            f"{chains}, and the tree {wide[0]} branches; use a chain: "
            f"TreeShape({wide[0].depth}, 1, {wide[0].depth + 1}); allowed: branch 1"
        )
    return tree
