"""A round captured once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from beagle_kernels import backends


class GraphError(RuntimeError):
    """A round cannot be captured; the message says why, and that graph=False decodes without."""


OPS = ("choose_tokens", "top_candidates", "build_tree", "verify_tree", "compact_cache_", "tree_attention")
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
            told = ", ".join(f"{name}: {why}" for name, why in reasons.items())
            raise GraphError(f"{op} has only its reference here ({told}), which a graph cannot hold; {_INSTEAD}")


class RoundGraph:
    """`play`, which reads and writes fixed CUDA buffers only, as a graph: `replay` runs it on the current stream.

    play runs a few times first, on a stream of its own, so that kernels are compiled and workspaces made before the
    capture: call this where doing so changes nothing (`Buffers.at_rest`). Graphs that share `pool`, a
    torch.cuda.graph_pool_handle(), share their intermediate memory: replay one at a time. Raises GraphError.
    """

    WARM_UP = 2

    def __init__(self, play: Callable[[], None], device: torch.device, pool):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(self.WARM_UP):
                    play()
            current.wait_stream(aside)
            try:
                # other threads of a server may go on allocating meanwhile
                with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                    play()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                why = _reason(error)
                raise GraphError(f"the round cannot be captured as a CUDA graph: {why}; {_INSTEAD}") from error

    def replay(self) -> None:
        self.graph.replay()


def _reason(error: BaseException) -> str:
    """The first of the errors behind this one: ending a broken capture raises another on top."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
