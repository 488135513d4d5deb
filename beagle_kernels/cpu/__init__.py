"""Faster than the reference on CPU tensors: the same ops in blocks that fit the caches, on PyTorch's own kernels."""

from __future__ import annotations

from ..backends import probe


@probe("cpu")
def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else "it takes CPU tensors"
