"""A round captured once as a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable

import torch

from beagle_kernels import backends


class GraphError(RuntimeError):
    """A round cannot be captured; the message says why, and that graph=False decodes without."""


OPS = (
    "choose_tokens",
    "top_candidates",
    "lookup",
    "join_branch",
    "build_tree",
    "tree_attention",
    "adjust_logits",
    "verify_tree",
    "compact_cache_",
)
"""Of a round."""
_INSTEAD = "allowed: graph=False, which decodes eagerly"


def check_capturable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise GraphError, which names why, unless a round on `device` is made of kernels that a graph can hold: the
    reference definitions ask the host."""
    if device.type != "cuda":
        raise GraphError(f"the target is on {device} and a graph is CUDA's; {_INSTEAD}")
    for op in OPS:
        if backends.resolve(op, "auto", device, dtype) == "reference":
            reasons = {name: backends.why_not(op, name, device, dtype) for name in ("cuda", "triton")}
            why_not = ", ".join(f"{name}: {why}" for name, why in reasons.items())
            raise GraphError(f"{op} has only its reference here ({why_not}), which a graph cannot hold; {_INSTEAD}")


class RoundGraph:
    """`play`, which reads and writes fixed CUDA buffers only, as a graph: `replay` runs it on the current stream.

    play runs a few times first, on a stream of its own, so that kernels are compiled and workspaces made before the
    capture: call this where doing so changes nothing (`Buffers.at_rest`). Graphs that share `pool`, a
    torch.cuda.graph_pool_handle(), share their intermediate memory: replay one at a time. Raises GraphError, with the
    current stream what it was; a pool that a capture failed in is not to be used again. reads: what must live as long.
    """

    WARM_UP = 2
    reads: object = None

    def __init__(self, play: Callable[[], None], device: torch.device, pool):
        self.graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, torch.cuda.device(device):
            aside, current = _stream_aside(torch.cuda.current_device()), torch.cuda.current_stream(device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(self.WARM_UP):
                    play()
            current.wait_stream(aside)
            handled = sys.exc_info()[1]
            try:
                _capture(self.graph, play, pool, aside)
            except BaseException as error:
                recover(self.graph, pool, aside)
                first = _first(error, handled)
                if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, Exception):
                    raise first from None
                why = next(iter(str(first).strip().splitlines()), type(first).__name__)
                raise GraphError(f"the round cannot be captured as a CUDA graph: {why}; {_INSTEAD}") from error

    def replay(self) -> None:
        self.graph.replay()


_one_at_a_time = threading.RLock()
"""Captures of several threads: they are on one stream, where one would record the work of the other."""


@functools.cache
def _stream_aside(device_index: int) -> torch.cuda.Stream:
    """The stream of every capture on a device: graphs share a pool's memory only if captured on one stream."""
    return torch.cuda.Stream(device_index)


def _capture(graph: torch.cuda.CUDAGraph, play: Callable[[], object], pool, aside: torch.cuda.Stream) -> None:
    # torch.cuda.graph stays on its stream where the capture cannot be ended: the outer context does not. Other threads
    # of a server may go on allocating meanwhile
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
    ):
        play()


_broken: list[torch.cuda.CUDAGraph] = []
"""Captures that could not be ended. The allocator of pinned memory goes on asking them, so they must not go."""


def recover(graph: torch.cuda.CUDAGraph, pool, aside: torch.cuda.Stream) -> None:
    """Undo what torch 2.11 leaves behind where CUDA cannot end a capture: the allocator still serves it from the pool,
    and the generator of random numbers refuses all work until another capture has ended."""
    with contextlib.suppress(RuntimeError):  # raised first of all where the capture did end, or never began
        torch._C._cuda_endAllocateToPool(aside.device_index, pool)
        torch._C._cuda_releasePool(aside.device_index, pool)
        _broken.append(graph)
        something = lambda: torch.zeros(1, device=aside.device)  # noqa: E731
        _capture(torch.cuda.CUDAGraph(), something, torch.cuda.graph_pool_handle(), aside)


def _first(error: BaseException, handled: BaseException | None) -> BaseException:
    """The first of the errors behind this one, as ending a broken capture raises another on top; not what was being
    handled before."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return error
