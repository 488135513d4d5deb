"""Compile Triton kernels for a GPU that is not there, and read what the assembler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory a block may use."""


class Compiled(NamedTuple):
    registers: int
    spills: int
    shared: int
    ptx: str


def compile_for(
    arch: int, kernel, pointers: dict[str, str | None], constants: dict, warps: int, stages: int
) -> Compiled:
    """Compile with 16-byte aligned pointers, strides and V multiples of 16; other arguments int32, `scale` float32.

    `pointers` maps a pointer argument to its element type, None for one that is not given.
    """
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            if pointers[name] is None:
                signature[name], constexprs[name] = "constexpr", None
            elif pointers[name].startswith("tensordesc"):
                signature[name] = pointers[name]
            else:
                signature[name] = "*" + pointers[name]
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("s_") or name == "V":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = resources(binary.asm["cubin"])
    return Compiled(registers, spills, binary.metadata.shared, binary.asm["ptx"])


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread (spills), as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", report)[1]), int(re.search(r"STACK:(\d+)", report)[1])
