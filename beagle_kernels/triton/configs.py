"""Tile sizes: a shipped table by architecture, head size and dtype, and tuning on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Rows and columns of a score tile, warps, and pipeline stages of the loop."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# kernel -> architecture -> padded head size -> 16-bit configuration. sm_90 also serves what is newer.
TABLE: dict[str, dict[int, dict[int, Config]]] = {
    "block_forward": {
        80: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 64, 8, 2)},
        90: {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    },
    "block_dq": {
        80: {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
        90: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
    },
    # block_m counts keys here, block_n query rows.
    "block_dkv": {
        80: {64: Config(128, 32, 8, 3), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 4, 1)},
        90: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 16, 8, 2)},
    },
    # block_m is the most rows a tile takes: fewer queries take a smaller one.
    "tree": {
        80: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 3), 256: Config(32, 32, 8, 2)},
        90: {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    },
}

CANDIDATES = [Config(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
"""What `tune` tries unless told otherwise."""

_tuned: dict[tuple, Config] = {}


def architecture(device: torch.device) -> int:
    """80 or 90, whichever table fits the device (90 under the interpreter)."""
    return 80 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9 else 90


def choose(kernel: str, arch: int, head_size: int, dtype: torch.dtype) -> Config:
    """The tuned configuration if there is one, else the table's; float32 tiles are at most 32 x 32."""
    if (config := _tuned.get((kernel, arch, head_size, dtype))) is not None:
        return config
    config = TABLE[kernel][arch][max(64, min(head_size, 256))]
    if dtype == torch.float32:
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 4, 1)
    return config


def tune(
    kernel: str,
    arch: int,
    head_size: int,
    dtype: torch.dtype,
    run: Callable[[], object],
    candidates: Iterable[Config] = CANDIDATES,
) -> Config:
    """Time `run`, which must launch `kernel`, under each candidate; later calls use the fastest. Never on its own.

    Raises RuntimeError during graph capture, or where no candidate runs.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"tuning {kernel} during graph capture; allowed: before it")
    key, times = (kernel, arch, head_size, dtype), {}
    before = _tuned.pop(key, None)
    try:
        for config in candidates:
            _tuned[key] = config
            try:
                times[config] = triton.testing.do_bench(run, return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        if not times:
            raise RuntimeError(f"tuning {kernel}: no candidate runs on this device")
        before = min(times, key=lambda config: times[config])
    finally:
        _tuned.pop(key, None)
        if before is not None:
            _tuned[key] = before
    return before
