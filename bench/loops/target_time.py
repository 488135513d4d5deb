"""What of a round is the target's own: seconds of its layers and of its LM head, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.decoding.graph import RoundGraph
from beagle_sd.models.head import Head, decoder_of

PARTS = ("layers", "head")


class TargetTime:
    """Takes the time of the calls on `tokens` new tokens a row that are made inside `watching`.

    On a GPU events stand around both parts. A graph records them anew whenever it is replayed, so the host waits for
    each replay and reads them: what is watched there is not to be timed as a whole.
    """

    def __init__(self, model: PreTrainedModel, tokens: int):
        self.model, self.tokens = model, tokens
        self.on_gpu = model.device.type == "cuda"
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.began: dict[str, float] = {}
        self.events: dict[str, list] = {}
        if self.on_gpu:
            self.events = {part: [torch.cuda.Event(enable_timing=True, external=True) for _ in "ab"] for part in PARTS}

    def medians(self) -> dict[str, float]:
        """Seconds of each part, and of both in one round, "all"; RuntimeError where no round was seen."""
        if not all(self.seconds.values()):
            raise RuntimeError(f"no round of {self.tokens} tokens was seen")
        rounds = [sum(both) for both in zip(*self.seconds.values())]
        return {part: statistics.median(found) for part, found in (self.seconds | {"all": rounds}).items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        decoder, module = decoder_of(self.model), self.model.get_output_embeddings()
        real, replay = Head.__call__, RoundGraph.replay

        def before(_, args, kwargs) -> None:
            if self._counted(kwargs.get("input_ids")):
                self._begin("layers")

        def after(_, args, kwargs, output) -> None:
            if self._counted(kwargs.get("input_ids")):
                self._end("layers")

        def head(head: Head, hidden: Tensor) -> Tensor:
            if head.module is not module or hidden.dim() != 3 or not self._counted(hidden):
                return real(head, hidden)
            self._begin("head")
            logits = real(head, hidden)
            self._end("head")
            return logits

        def replayed(graph: RoundGraph) -> None:
            replay(graph)
            self._read()

        hooks = [
            decoder.register_forward_pre_hook(before, with_kwargs=True),
            decoder.register_forward_hook(after, with_kwargs=True),
        ]
        Head.__call__, RoundGraph.replay = head, replayed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Head.__call__, RoundGraph.replay = real, replay  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    def _counted(self, given: Tensor | None) -> bool:
        return given is not None and given.shape[1] == self.tokens

    def _begin(self, part: str) -> None:
        if self.on_gpu:
            self.events[part][0].record()
        self.began[part] = time.perf_counter()

    def _end(self, part: str) -> None:
        if self.on_gpu:
            self.events[part][1].record()
        else:
            self.seconds[part].append(time.perf_counter() - self.began[part])

    def _read(self) -> None:
        """What a replay that has just been started took."""
        if self.on_gpu:
            torch.cuda.synchronize()
            for part, (start, end) in self.events.items():
                self.seconds[part].append(start.elapsed_time(end) / 1e3)
