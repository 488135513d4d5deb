"""Other packages' ways to the same result, through their public API: a module a package.

A module's `why_not(device)` gives None where the package can be compared there, else the reason, which stands in the
tables instead of a number. `python -m bench.peers` prints all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

LEFT_OUT = {
    "vLLM rejection sampler": "internal to the engine, and its arguments changed between versions",
    "transformers, assisted generation": "no smaller model with SmolLM2's tokenizer can be had from a package "
    "registry; prompt lookup, which needs none, is in bench.answers.speed",
}
"""Peers that no module adapts, and why."""


def missing(package: str) -> str | None:
    """The reason where a package is not installed, None where it is."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def needs_gpu(package: str, device: str) -> str | None:
    """The reason why a package of CUDA kernels cannot be compared there, None if it can."""
    return missing(package) or (None if device == "cuda" else f"{package} needs a CUDA device")


def or_reason(why: str | None, make: Callable[[], Callable]) -> Callable | str:
    """A peer for `Case.peers`: what `make` gives, or the reason for its absence."""
    return why or make()


def table(device: str) -> dict[str, str | None]:
    """Every peer by name, with the reason where it cannot be compared on `device`."""
    found = {}
    for name in ("sdpa", "flex", "eagle2_tree", "liger", "flashinfer", "sglang", "prompt_lookup"):
        module = importlib.import_module(f"bench.peers.{name}")
        found[module.NAME] = module.why_not(device)
    return found | LEFT_OUT
