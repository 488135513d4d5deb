"""The Triton kernels compiled for GPUs that are not there: python -m bench.compiled --help

Inside `compiling_for`, the launchers choose tiles and arguments as on that GPU, Triton compiles, and nothing runs. So
what is read off here, registers, spills, shared memory and seconds of compiling, is what a user's first call makes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory a block may use, by architecture."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_numbers = itertools.count()


class Compiled(NamedTuple):
    """A kernel as the assembler made it: registers and bytes of local memory (spills) a thread, bytes of shared memory
    a block, seconds of compiling (None where it came from Triton's cache), its PTX and its file of machine code."""

    name: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    seconds: float | None
    ptx: str
    cubin: Path


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Inside, the Triton ops take CPU tensors and compile for sm_`arch`; gives what was compiled, in order. Outputs
    hold nothing. A kernel that takes more shared memory than the GPU has raises Triton's OutOfResources."""
    from triton import knobs
    from triton.runtime import driver

    import beagle_kernels.triton as package
    from beagle_kernels.triton import configs

    found: list[Compiled] = []

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:
        files = {Path(name).suffix: Path(path) for name, path in metadata_group.items()}
        registers, spills = resources(files[".cubin"])
        seconds = None if cache_hit else times.total / 1e6
        found.append(
            Compiled(
                metadata["name"],
                metadata["num_warps"],
                metadata["num_stages"],
                registers,
                spills,
                metadata["shared"],
                seconds,
                files[".ptx"].read_text(),
                files[".cubin"],
            )
        )

    before = driver._active
    driver.set_active(_absent_gpu(arch))
    try:
        with (
            mock.patch.object(package, "interpreting", lambda: True),
            mock.patch.object(configs, "ON_HOST", arch),
            knobs.compilation.scope(),
        ):
            knobs.compilation.listener = listen
            yield found
    finally:
        driver._active = before


def _absent_gpu(arch: int) -> SimpleNamespace:
    """A driver for Triton whose device compiles and launches nothing; a new device each time, since Triton keeps what
    it compiled by device."""
    from triton.backends.compiler import GPUTarget

    number = f"sm_{arch}, {next(_numbers)}"
    properties = {"max_shared_mem": SHARED_LIMIT[arch], "multiprocessor_count": 132}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties, load_binary=lambda *args: (None, None, 0, 0, 1024)
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=lambda src, metadata: lambda *args: None,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: number,
        get_current_stream=lambda device: 0,
    )


def resources(cubin: Path) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread (spills), as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", report)[1]), int(re.search(r"STACK:(\d+)", report)[1])  # type: ignore[index]


def block_attention(head_size: int, dtype: torch.dtype, rows: int = 256, reach: int | None = None) -> None:
    """Forward and backward of packed sequences, which hold more than a single one: three kernels."""
    from beagle_kernels.triton.block_attention import block_attention as forward
    from beagle_kernels.triton.block_attention_backward import block_attention_backward

    q, k, v = (torch.zeros(rows, heads, head_size, dtype=dtype) for heads in (32, 8, 8))
    offset, bounds = torch.zeros(2, dtype=torch.int32), torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    shared = offset, bounds, 5, 1.0, reach
    out, lse = forward(q, k, v, *shared)
    block_attention_backward(q, lse, q, k, v, out, lse, *shared)


def extend_attention(head_size: int, dtype: torch.dtype, rows: int = 64) -> None:
    from beagle_kernels.triton import extend_attention as kernels

    q, lse = torch.zeros(rows, 32, head_size, dtype=dtype), torch.zeros(rows, 32)
    k = torch.zeros(rows, 3, 8, head_size, dtype=dtype)
    kernels.extend_attention(q, lse, q, k, k, 1.0)
    kernels.extend_attention_backward(q, lse, q, lse, q, k, k, 1.0)


def tree_attention(
    head_size: int,
    dtype: torch.dtype,
    nodes: int = 60,
    paged: bool = False,
    value_size: int | None = None,
    starts: bool = False,
    sinks: bool = False,
    softcap: float | None = None,
) -> None:
    """The splits and their combination, of few heads, so that there is more than one split; values as wide as keys
    unless `value_size` says otherwise."""
    from beagle_kernels.triton import tree_attention as kernels

    q, lengths = torch.zeros(1, nodes, 8, head_size, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    k, v = (
        torch.zeros((64, 2, 16, size) if paged else (1, 2, 1024, size), dtype=dtype)
        for size in (head_size, value_size or head_size)
    )
    table = torch.zeros(1, 64, dtype=torch.int32) if paged else None
    mask = torch.zeros(1, nodes, -(-nodes // 64), dtype=torch.int64)
    first = torch.zeros(1, nodes, dtype=torch.int32) if starts else None
    kernels.tree_attention(q, k, v, lengths, mask, table, 1.0, first, torch.zeros(8) if sinks else None, softcap)


def distill_loss(width: int, dtype: torch.dtype) -> None:
    from beagle_kernels.triton import distill_loss as kernels

    x, weight = torch.zeros(16, width, dtype=dtype), torch.zeros(4096, width, dtype=dtype)
    kernels.distill_loss(x, x, weight, torch.ones(16), 10.0, True)


LAUNCHES: dict[str, Callable[[int, torch.dtype], None]] = {
    "block_attention": block_attention,
    "extend_attention": extend_attention,
    "tree_attention, 60 nodes": tree_attention,
    "tree_attention, 60 nodes, pages": lambda size, dtype: tree_attention(size, dtype, paged=True),
    "tree_attention, 60 nodes, window, sinks, soft cap": lambda size, dtype: tree_attention(
        size, dtype, starts=True, sinks=True, softcap=50.0
    ),
    "tree_attention, 8 nodes": lambda size, dtype: tree_attention(size, dtype, nodes=8),
    "distill_loss": distill_loss,
}
"""What a row of the table launches, with a head size (distill_loss: a width) and a dtype."""


def rows(name: str, arch: int, head_size: int, dtype: str) -> list[dict]:
    """A row a kernel that the launch is the first to compile; raises what the compiler does."""
    labels = {"launch": name, "arch": arch, "head_size": head_size, "dtype": dtype}
    with compiling_for(arch) as found:
        LAUNCHES[name](head_size, DTYPES[dtype])
    fields = ("warps", "stages", "registers", "spills", "shared", "seconds")
    return [
        {**labels, "kernel": one.name, **{field: getattr(one, field) for field in fields}}
        for one in found
        if one.seconds is not None
    ]


def main(arguments: list[str]) -> int:
    """Print a line a kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES), help=", ".join(LAUNCHES))
    parser.add_argument("--archs", nargs="+", type=int, choices=SHARED_LIMIT, default=[80, 90], help="80 is sm_80")
    parser.add_argument("--head-sizes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    import triton

    results: list[dict] = []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}):
        for name, arch, size, dtype in itertools.product(
            options.launches, options.archs, options.head_sizes, options.dtypes
        ):
            for row in rows(name, arch, size, dtype):
                results.append(row | {"triton": triton.__version__})
                print(
                    f"sm_{arch} {row['kernel']:32} {dtype:9} {size:4} {row['registers']:4} registers "
                    f"{row['spills']:6} B spilt {row['shared']:7} B shared {row['seconds']:6.1f} s",
                    flush=True,
                )
            if options.json:
                from beagle_sd.files import write_json  # not above: compiling needs no transformers

                write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
