"""Checks shared by the public functions: each raises with what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import DraftTree, Sampling

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Floating dtypes; float64 is served by the reference only."""


def tensor(op: str, name: str, value: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Check rank, every size that is not None, and dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; allowed: a torch.Tensor")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} is {str(value.dtype).removeprefix('torch.')}; allowed: {allowed}")
    sizes = value.shape
    # a tuple without None is compared at once: small ops check a dozen tensors a call
    if sizes != shape and not _fits(sizes, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {list(sizes)}; allowed: [{wanted}]")


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(sizes) != len(shape):
        return False
    for have, want in zip(sizes, shape):
        if want is not None and have != want:
            return False
    return True


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Check that all tensors given live on one device."""
    first = None
    for value in tensors.values():
        if value is None:
            continue
        if first is None:
            first = value.device
        elif value.device != first:
            listed = ", ".join(f"{name} on {value.device}" for name, value in tensors.items() if value is not None)
            raise ValueError(f"{op}: {listed}; allowed: all on one device")


def heads(op: str, query: int, key: int, width: int) -> None:
    """Check that every key head serves the same number of query heads, and that a head holds something."""
    if query < 1 or key < 1 or query % key:
        raise ValueError(f"{op}: {query} query heads and {key} key heads; allowed: 1 or more, a multiple of the latter")
    at_least(op, "head size", width, 1)


LOGITS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of logits: sampling is defined in f32."""

INT64, INT32, FLOAT32 = (torch.int64,), (torch.int32,), (torch.float32,)
_SAMPLING = tuple(
    (f"sampling.{name}", dtypes) for name, dtypes in zip(Sampling._fields, (INT64, FLOAT32, INT32, FLOAT32, FLOAT32))
)


def sampling(op: str, value: Sampling, rows: int) -> None:
    """Check the settings' shapes and dtypes; their values live on the device and are not read."""
    if not isinstance(value, Sampling):
        raise TypeError(f"{op}: sampling is a {type(value).__name__}; allowed: a Sampling")
    shape = (rows,)
    for (name, dtypes), field in zip(_SAMPLING, value):
        tensor(op, name, field, shape, dtypes)


def tree(op: str, value: DraftTree) -> tuple[int, int]:
    """Check a tree's shapes and dtypes; returns (B, N)."""
    if not isinstance(value, DraftTree):
        raise TypeError(f"{op}: tree is a {type(value).__name__}; allowed: a DraftTree")
    tokens, parents, depth, mask, size, max_depth = value
    tensor(op, "tree.tokens", tokens, (None, None), INT64)
    batch, nodes = shape = tokens.shape
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(f"{op}: the tree has {nodes} nodes; allowed: 1 to {MAX_NODES}")
    tensor(op, "tree.parents", parents, shape, INT32)
    tensor(op, "tree.depth", depth, shape, INT32)
    tensor(op, "tree.mask", mask, (batch, nodes, (nodes + 63) // 64), INT64)
    tensor(op, "tree.size", size, (batch,), INT32)
    at_least(op, "tree.max_depth", max_depth, 0)
    return batch, nodes


def at_least(op: str, name: str, value: int, least: int, most: int = 2**31 - 1, other: str = "") -> None:
    """Check a Python integer and its bounds; `other` is what else the caller allows, for the message."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; allowed: an int{other}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name} is {value}; allowed: {least} to {most}{other}")


MAX_NODES = 1024
"""Nodes of a draft tree, the root counted."""
