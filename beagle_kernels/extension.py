"""The extension `beagle_kernels._C`: whether its executors can serve, and what calling them takes.

The extension is optional: without it the reference serves. It takes pointers, sizes, strides, and the number of
threads or the stream; outputs and workspaces are allocated here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .backends import BackendError, device_index, implementation

try:
    from . import _C

    _CODES, _ = _C.dtypes, _C.instruction_sets
except (ImportError, AttributeError) as error:  # the latter from one that was built of older sources
    _C, _CODES, _WHY = None, {}, str(error)  # type: ignore[assignment]

BUILD = "build it with 'pip install .' or 'python setup.py build_ext --inplace'"


class _Codes(dict):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise TypeError(f"the compiled executors were given {dtype}; allowed: {', '.join(map(str, self))}")


DTYPES = _Codes({getattr(torch, name): code for name, code in _CODES.items()})
"""The extension's number for each dtype that it takes."""


def kind_of(weight: Tensor, dtype: torch.dtype) -> int:
    """The extension's number for a weight that is multiplied with rows of `dtype`."""
    if weight.dtype == torch.int8:
        return _C.int8
    return _C.exact if weight.dtype == torch.bfloat16 and dtype == torch.float32 else DTYPES[weight.dtype]


ENOUGH_BLOCKS = 256
"""Blocks that keep a CUDA device busy."""
LONG_ROW = 16384
"""Tokens from which rows are split over CPU threads, if there are fewer rows than threads."""


def described() -> str:
    """How the extension was built, and which of its instruction sets serves here."""
    if _C is None:
        return f"no extension ({_WHY}); {BUILD}"
    cuda = f"CUDA for {_C.archs}" if hasattr(_C, "cuda") else f"no CUDA half: {_C.no_cuda}"
    return f"extension for CPU ({_C.instruction_set}), {cuda}"


def multiplies_bf16() -> bool:
    """Whether this machine has an instruction for products of bf16, and the extension the code for it."""
    return _C is not None and "bf16" in _C.instruction_set


def missing_cpu(device: torch.device) -> str | None:
    """Why the host executor cannot serve tensors on the device."""
    if _C is None:
        return f"the extension is not built ({_WHY}); {BUILD}"
    return None if device.type == "cpu" else "it takes CPU tensors"


def missing_cuda(device: torch.device) -> str | None:
    """Why the CUDA executor cannot serve tensors on the device."""
    if _C is None:
        return f"the extension is not built ({_WHY}); {BUILD}"
    if not hasattr(_C, "cuda"):
        return f"the extension has no CUDA half: {_C.no_cuda}"
    return _unserved(device_index(device)) if device.type == "cuda" else "it takes CUDA tensors"


@functools.cache
def _unserved(index: int) -> str | None:
    """Why the kernels cannot run on the CUDA device of this number: its driver is asked, once."""
    # torch's own way there and back makes no context on the device that was current
    with torch.cuda.device(index) if index < torch.cuda.device_count() else contextlib.nullcontext():
        why = _C.cuda.why_not(index)
    return why and f"the extension's kernels cannot run on cuda:{index}: {why}"


def compiled(op: str):
    """Register the decorated function for both executors."""

    def register(function):
        implementation(op, "cpu", missing_cpu)(function)
        return implementation(op, "cuda", missing_cuda)(function)

    return register


@contextlib.contextmanager
def _on(device: torch.device):
    with torch.cuda.device(device):
        yield _C.cuda, torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _with(threads: int):
    return contextlib.nullcontext((_C.cpu, threads))


def executor(device: torch.device):
    """A context that gives the executor's module and the threads or stream to run on."""
    return _on(device) if device.type == "cuda" else _with(torch.get_num_threads())


def chunks_of(rows: int, vocab: int, device: torch.device) -> int:
    """Parts a row is split into: on CUDA of a chunk's length, less where few rows would leave most of a device idle."""
    if device.type == "cuda":
        chunks = [max(1, -(-vocab // (_C.chunk // split))) for split in (1, 2, 4)]
        return next((count for count in chunks if rows * count >= ENOUGH_BLOCKS), chunks[-1])
    threads = torch.get_num_threads()
    return 1 if rows >= threads or vocab < LONG_ROW else min(-(-threads // max(rows, 1)), vocab // (LONG_ROW // 2))


def group_room(logits: Tensor, rows: int, chunks: int) -> Tensor | None:
    """Where the CUDA executor notes what it knows of each group of 64 tokens of so many rows of so many chunks."""
    floats = rows * (chunks * _C.chunk // 32 + 2 * _C.row_words)
    return logits.new_empty(floats, dtype=torch.float32) if logits.is_cuda else None


def allow(op: str, name: str, value: int, most: int, device: torch.device) -> None:
    """Raise BackendError for what the CUDA kernels have no room for; the other executors take any number."""
    if value > most and device.type == "cuda":
        raise BackendError(f"{op}: {name} is {value}; allowed by backend 'cuda': up to {most}")


def dense(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def flat(*tensors: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors made contiguous, to be kept alive, and their addresses."""
    kept = [*map(Tensor.contiguous, tensors)]
    return kept, addresses(kept)


def addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The addresses of contiguous tensors."""
    return tuple(map(Tensor.data_ptr, tensors))


def address(tensor: Tensor | None) -> int:
    """A contiguous tensor's address; 0 for None alone: an empty tensor, which has none, is not taken for it."""
    return 0 if tensor is None else tensor.data_ptr() or 64


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous; None stays."""
    return None if tensor is None else tensor.contiguous()
