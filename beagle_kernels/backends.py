"""Which backend serves an op: registration, choice, and the reasons why not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In the order "auto" tries them; "reference" is always there."""

_library = torch.library.Library("beagle", "FRAGMENT")
_implementations: dict[str, dict[str, Callable]] = {}
_probes: dict[str, Callable[[torch.device], str | None]] = {}
_needs: dict[tuple[str, str], Callable[[torch.device], str | None]] = {}
_without_float64: set[tuple[str, str]] = set()
_resolved: dict[tuple, str] = {}


class BackendError(ValueError):
    """The backend asked for cannot serve this call; the message says why."""


def implementation(
    op: str, backend: str, needs: Callable[[torch.device], str | None] | None = None, float64: bool = True
) -> Callable[[Callable], Callable]:
    """Register the decorated function as `backend`'s implementation of `op`: same flat arguments as the reference.

    needs(device) is a probe of this implementation alone, asked after the backend's own; without `float64` the
    reference serves that dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {BACKENDS}")

    def register(function: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = function
        if needs is not None:
            _needs[op, backend] = needs
        if not float64:
            _without_float64.add((op, backend))
        _resolved.clear()
        return function

    return register


def probe(backend: str) -> Callable[[Callable], Callable]:
    """Register the decorated `why_not(device) -> str | None`: None where the backend can run there.

    It is asked once a device and op, when a call first needs it; only for a CUDA device may it ask the driver.
    """

    def register(function: Callable[[torch.device], str | None]) -> Callable:
        _probes[backend] = function
        _resolved.clear()
        return function

    return register


def operator(
    name: str, mutates_args: tuple[str, ...] = (), tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable], Any]:
    """Register the decorated function as the op beagle::name, for every device, with its schema from its annotations.

    Does what torch.library.custom_op does, without its 20 microseconds a call. `function.register_fake` follows, and
    `function.register_autograd` where the op is differentiable.
    """

    def register(function: Any) -> Any:
        schema = name + torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, function, "CompositeExplicitAutograd")
        for register_more in (torch.library.register_fake, torch.library.register_autograd):
            more = functools.partial(register_more, f"beagle::{name}", lib=_library)
            setattr(function, register_more.__name__, more)
        return function

    return register


def device_index(device: torch.device) -> int:
    """The number of a CUDA device, the current one's for a bare "cuda"; no device is there where torch sees none."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot serve `op` on `device`, on tensors of `dtype` if given; None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend; allowed: 'auto', {', '.join(map(repr, BACKENDS))}"
    if backend not in _implementations.get(op, {}):
        return f"{op} has no {backend} implementation"
    if dtype == torch.float64 and (backend == "triton" or (op, backend) in _without_float64):
        return "it has no float64"
    for probe_of in (_probes.get(backend), _needs.get((op, backend))):
        if probe_of is not None and (reason := probe_of(device)) is not None:
            return reason
    return None


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that serves this call: "auto" is the first of BACKENDS that can.

    Raises BackendError with the reason where a backend asked for by name cannot.
    """
    key = (op, backend, device, dtype)
    if (found := _resolved.get(key)) is not None:
        return found
    if backend == "auto":
        return _resolved.setdefault(key, next(b for b in BACKENDS if why_not(op, b, device, dtype) is None))
    if (reason := why_not(op, backend, device, dtype)) is not None:
        raise BackendError(f"beagle::{op}: backend {backend!r} cannot serve tensors on {str(device)!r}: {reason}")
    return _resolved.setdefault(key, backend)


def call(op: str, backend: str, device: torch.device, *args):
    """Run `op` on the backend that `resolve` gives, with the op's flat arguments."""
    return _implementations[op][resolve(op, backend, device, args[0].dtype)](*args)


def table() -> dict[str, tuple[str, ...]]:
    """The backends that implement each op, in the order "auto" tries them."""
    return {op: tuple(b for b in BACKENDS if b in have) for op, have in sorted(_implementations.items())}
