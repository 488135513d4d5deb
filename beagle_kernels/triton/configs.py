"""Tile sizes: a shipped table by architecture, head size and dtype, and tuning on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Rows and columns of a score tile, warps, pipeline stages of the loop, whether it reads by TMA (sm_90 on), and
    whether the forward multiplies the next tile's scores before the softmax of this one's."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    ahead: bool = False


# kernel -> architecture -> padded head size -> 16-bit configuration. A GPU takes the last row that is not newer.
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
    # Those of sm_80 and sm_120 need at most 99 KB of shared memory, which is all that sm_86, sm_89 and sm_120 have.
    "tree": {
        80: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 8, 3), 256: Config(32, 32, 8, 2)},
        90: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)},
        100: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 4), 256: Config(64, 32, 8, 3)},
        120: {64: Config(64, 64, 4, 3), 128: Config(32, 32, 4, 3), 256: Config(32, 32, 8, 2)},
    },
}

# kernel -> padded head size -> float32 configuration, on every architecture.
FLOAT32: dict[str, dict[int, Config]] = {
    "tree": {64: Config(32, 32, 8, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 64, 8, 1)},
}

def _candidates(plain: str, tma: str = "") -> list[Config]:
    """From "block_m x block_n x warps x stages" each."""
    found: list[Config] = []
    for tiles in (*plain.split(), *tma.split()):
        m, n, warps, stages = map(int, tiles.split("x"))
        found.append(Config(m, n, warps, stages, len(found) >= len(plain.split())))
    return found


# Those of a wider search that Triton 3.9 compiled for sm_90 without spills (block_dkv of 256: the fewest).
CANDIDATES: dict[str, dict[int, list[Config]]] = {
    "block_forward": {
        64: _candidates("128x128x8x2 128x128x8x3 128x64x8x3 128x64x8x4 64x64x4x4", "128x128x8x2 128x128x8x3"),
        128: _candidates("128x64x8x2 128x64x8x3 128x32x8x4", "128x64x8x3 128x64x8x4 128x128x8x2 128x128x8x3"),
        256: _candidates("128x32x8x2", "128x32x8x3 128x64x8x2"),
    },
    "block_dq": {
        64: _candidates("128x64x8x2 128x64x8x3 128x128x8x2 64x64x4x3", "128x64x8x3 128x128x8x2"),
        128: _candidates("128x64x8x2 128x64x8x3 128x32x8x3 64x64x8x2 64x32x4x3", "128x64x8x2 128x64x8x3"),
        256: _candidates("128x32x8x1 128x32x8x2", "128x32x8x2"),
    },
    "block_dkv": {
        64: _candidates("128x64x8x2 128x64x8x3 128x32x8x3", "128x64x8x3"),
        128: _candidates("128x32x8x2", "128x32x8x3 64x64x8x3"),
        256: _candidates("64x16x8x2 32x32x8x1", "64x16x8x2 64x32x8x2"),
    },
    "tree": {
        64: _candidates("64x64x4x3 64x64x4x4 64x128x4x3 128x64x4x3 128x64x8x3 128x128x8x3"),
        128: _candidates("64x64x4x3 64x64x8x3 64x128x8x2 128x64x8x2 128x64x8x3 128x128x8x2"),
        256: _candidates("64x64x8x2 64x32x8x3"),
    },
}
"""What `tune` tries unless told otherwise."""

_tuned: dict[tuple, Config] = {}


ON_HOST = 90
"""The architecture whose tiles CPU tensors take: under the interpreter, or where kernels are only compiled."""


def architecture(device: torch.device) -> int:
    """90 is sm_90."""
    if device.type != "cuda":
        return ON_HOST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, arch: int, head_size: int, dtype: torch.dtype, tma: bool = False) -> Config:
    """The tuned configuration if there is one, else the table's; float32 tiles not listed are at most 32 x 32.

    One that reads by TMA serves where the tensors let it (`tma`).
    """
    config = _tuned.get((kernel, arch, head_size, dtype))
    if config is not None and (tma or not config.tma):
        return config
    size = max(64, min(head_size, 256))
    if dtype == torch.float32 and kernel in FLOAT32:
        return FLOAT32[kernel][size]
    rows = TABLE[kernel]
    config = rows[max((row for row in rows if row <= arch), default=min(rows))][size]
    if dtype == torch.float32:
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 4, 1)
    return config


def tune(
    kernel: str,
    arch: int,
    head_size: int,
    dtype: torch.dtype,
    run: Callable[[], object],
    candidates: Iterable[Config] | None = None,
) -> Config:
    """Time `run`, which must launch `kernel`, under each candidate; later calls use the fastest. Never on its own.

    The candidates are CANDIDATES' and the table's unless given; those that read by TMA are left out below sm_90.

    Raises RuntimeError during graph capture, or where no candidate runs.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"tuning {kernel} during graph capture; allowed: before it")
    key, times = (kernel, arch, head_size, dtype), {}
    before = _tuned.pop(key, None)
    if candidates is None:
        listed = [*CANDIDATES[kernel][max(64, min(head_size, 256))], choose(*key)]
        candidates = dict.fromkeys(config for config in listed if arch >= 90 or not config.tma)
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
