"""The instruction sets that the extension is compiled for, each of which tests can let serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from beagle_kernels.extension import _C

HERE: tuple[str, ...] = _C.instruction_sets if _C is not None else ()
"""Those that this machine has, from the least to the best."""


@contextmanager
def using(name: str) -> Iterator[None]:
    """The extension by one of HERE."""
    _C.use_instruction_set(name)
    try:
        yield
    finally:
        _C.use_instruction_set(HERE[-1])
