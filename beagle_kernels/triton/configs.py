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


Table = dict[str, dict[int, dict[int, Config]]]

# kernel -> architecture -> padded head size -> 16-bit configuration. A GPU takes the last row that is not newer, sm_120
# that of sm_80 where it has none: it has sm_80's matrix instructions. Both fit into the 99 KB of shared memory that
# sm_86, sm_89 and sm_120 have.
TABLE: Table = {
    "block_forward": {
        80: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        90: {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    },
    "block_dq": {
        80: {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
        90: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
        100: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
    },
    # block_m counts keys here, block_n query rows.
    "block_dkv": {
        80: {64: Config(128, 32, 8, 3), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
        90: {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 16, 8, 2)},
        100: {64: Config(128, 64, 8, 1), 128: Config(128, 64, 8, 1), 256: Config(32, 32, 8, 1)},
    },
    # block_m is the most rows a tile takes: fewer queries take a smaller one.
    "tree": {
        80: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 8, 3), 256: Config(32, 32, 8, 2)},
        90: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)},
        100: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 4), 256: Config(64, 32, 8, 3)},
        120: {64: Config(64, 64, 4, 3), 128: Config(32, 32, 4, 3), 256: Config(32, 32, 8, 2)},
    },
    # Of few rows (tree_splits.FEW_ROWS), which take as long as their keys are read.
    "tree_few": {
        80: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 8, 3), 256: Config(32, 32, 8, 2)},
        90: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 3)},
        100: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 4), 256: Config(64, 32, 8, 3)},
        120: {64: Config(64, 64, 4, 3), 128: Config(32, 32, 4, 3), 256: Config(32, 32, 8, 2)},
    },
}

# The same of float32, whose products take three times the registers.
FLOAT32: Table = {
    "block_forward": {
        80: {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
        90: {64: Config(128, 32, 8, 2), 128: Config(32, 32, 4, 1), 256: Config(16, 32, 8, 1)},
    },
    "block_dq": {
        80: {64: Config(32, 32, 8, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, 8, 1)},
        90: {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "block_dkv": {
        80: {64: Config(32, 32, 4, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
        90: {64: Config(32, 32, 4, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "tree": {80: {64: Config(32, 32, 8, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 64, 8, 1)}},
    "tree_few": {80: {64: Config(32, 32, 8, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 64, 8, 1)}},
}


def _listed(plain: str, more: str = "", **options: bool) -> list[Config]:
    """From "block_m x block_n x warps x stages" each; those of `more` with the options."""
    found = []
    for names, given in ((plain, {}), (more, options)):
        for tiles in names.split():
            m, n, warps, stages = map(int, tiles.split("x"))
            found.append(Config(m, n, warps, stages, **given))
    return found


# Those of a wider search whose loop over whole tiles, by Triton 3.6 for sm_90, hardly uses local memory. Some
# of them spill outside of that loop, a few times a head.
CANDIDATES: dict[str, dict[int, list[Config]]] = {
    "block_forward": {
        64: _listed("128x128x8x2 128x128x8x3 128x64x8x3 128x64x4x3 64x64x4x4")
        + _listed("", "128x128x8x2 128x128x8x3 128x64x4x3 256x64x8x3", tma=True)
        + _listed("", "128x64x8x3", ahead=True)
        + _listed("", "128x64x8x3", tma=True, ahead=True),
        128: _listed("128x64x8x2 128x64x8x3 128x32x8x3 128x32x8x4 256x64x8x2")
        + _listed("", "128x64x8x3 128x64x8x4 128x128x8x2 128x128x8x3 128x32x8x4 128x64x4x2 64x64x4x3", tma=True)
        + _listed("", "128x64x8x3", ahead=True)
        + _listed("", "128x64x8x3 128x128x8x2", tma=True, ahead=True),
        256: _listed("128x32x8x2", "128x32x8x3 128x64x8x2", tma=True),
    },
    "block_dq": {
        64: _listed("128x64x8x2 128x64x8x3 128x128x8x2 64x64x4x3")
        + _listed("", "128x64x8x3 128x128x8x2 128x64x4x2 64x64x4x3", tma=True),
        128: _listed("128x64x8x2 128x64x8x3 128x32x8x3 64x64x4x2 64x32x4x3")
        + _listed("", "128x64x8x2 128x64x8x3 128x128x8x2 64x64x4x2", tma=True),
        256: _listed("128x32x8x1 128x32x8x2", "128x32x8x2", tma=True),
    },
    "block_dkv": {
        64: _listed("128x64x8x2 128x64x8x3 128x32x8x3 64x64x4x2 64x32x4x3")
        + _listed("", "128x64x8x2 128x64x8x3 64x64x4x2 64x64x4x3", tma=True),
        128: _listed("128x32x8x2 128x64x8x2 64x64x8x1 64x64x4x2 64x32x8x2")
        + _listed("", "128x32x8x3 128x64x8x1 128x64x8x2 64x64x8x2 64x64x8x3 64x64x4x1 64x64x4x2 64x32x4x3", tma=True),
        256: _listed("64x16x8x2 32x32x8x1", "64x16x8x2 64x32x8x2", tma=True),
    },
    "tree": {
        64: _listed("64x64x4x3 64x64x4x4 64x128x4x3 128x64x4x3 128x64x8x3 128x128x8x3"),
        128: _listed("64x64x4x3 64x64x8x3 64x128x8x2 128x64x8x2 128x64x8x3 128x64x8x4 128x128x8x2 128x128x8x3"),
        256: _listed("64x64x8x2 64x32x8x3"),
    },
    "tree_few": {
        64: _listed("64x64x4x3 64x64x4x4 64x64x4x5 64x128x4x2 64x128x4x3"),
        128: _listed("64x64x4x2 64x64x4x3 64x64x4x4 64x128x4x2 64x32x4x4 64x32x4x5 64x64x8x3 64x128x8x2"),
        256: _listed("64x64x8x2 64x32x8x3"),
    },
}
"""What `tune` tries in 16 bits unless told otherwise, beside the shipped tiles."""

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
    """The tuned configuration if there is one, else the table's. One that reads by TMA serves where the tensors let it
    (`tma`)."""
    config = _tuned.get((kernel, arch, head_size, dtype))
    if config is not None and (tma or not config.tma):
        return config
    rows = (FLOAT32 if dtype == torch.float32 else TABLE)[kernel]
    row = max((row for row in rows if row <= arch), default=80)
    if arch >= 120 > row:
        row = 80
    return rows[row][max(64, min(head_size, 256))]


def candidates(kernel: str, arch: int, head_size: int, dtype: torch.dtype) -> list[Config]:
    """What `tune` tries: first the configuration in use, then CANDIDATES', or in float32 up to twice as many rows,
    columns and warps. Those that read by TMA are left out below sm_90."""
    first = choose(kernel, arch, head_size, dtype, tma=arch >= 90)
    if dtype == torch.float32:
        more = [
            first._replace(block_m=first.block_m * m, block_n=first.block_n * n, warps=warps)
            for m in (1, 2)
            for n in (1, 2)
            for warps in (4, 8)
        ]
    else:
        more = CANDIDATES[kernel][max(64, min(head_size, 256))]
    return list(dict.fromkeys(config for config in (first, *more) if arch >= 90 or not config.tma))


def tune(
    kernel: str,
    arch: int,
    head_size: int,
    dtype: torch.dtype,
    run: Callable[[], object],
    tried: Iterable[Config] | None = None,
) -> Config:
    """Time `run`, which must launch `kernel`, under each configuration tried (default: `candidates`); later calls use
    the fastest. Never on its own.

    Raises RuntimeError during graph capture, or where none runs, with the reasons.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"tuning {kernel} during graph capture; allowed: before it")
    key, times, reasons = (kernel, arch, head_size, dtype), {}, {}
    before = _tuned.pop(key, None)
    try:
        for config in candidates(*key) if tried is None else tried:
            _tuned[key] = config
            try:
                times[config] = triton.testing.do_bench(run, return_mode="median")
            except Exception as error:  # tiles that do not fit or do not compile
                reasons[config] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if not times:
            told = "; ".join(f"{'x'.join(map(str, config[:4]))}: {why}" for config, why in reasons.items())
            raise RuntimeError(f"tuning {kernel}: no candidate runs on this device ({told})")
        before = min(times, key=lambda config: times[config])
    finally:
        _tuned.pop(key, None)
        if before is not None:
            _tuned[key] = before
    return before
