"""What nvcc makes of csrc/cuda: each kernel's registers and its instructions, read by cuobjdump.

code = kernels(assembled("compact_cache", "90", folder))
kernel = find(code, "move_columns", "Sixteen")
loop = hot_loop(kernel)
len(loop), kernel.registers, loads_in_flight(loop)
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ("--fmad=false", "-std=c++17", "-O3", "-DNDEBUG")
"""Those of setup.py's that the machine code depends on."""
WIDE = "LDG.E.128"


class Instruction(NamedTuple):
    """One line of SASS: `guard` is the predicate before it, as @!P0, or nothing."""

    address: int
    guard: str
    opcode: str
    operands: str


class Kernel(NamedTuple):
    """A kernel by its mangled name: registers and bytes of local memory (stack and spills) a thread, bytes of shared
    memory a block, and its instructions in their order."""

    name: str
    registers: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]


def cuobjdump() -> str | None:
    """The path of the one on PATH or, with no CUDA beside nvcc, of Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))


def assembled(name: str, arch: str, folder: Path) -> Path:
    """The object file of csrc/cuda/`name`.cu for sm_`arch`, in `folder`; compiled unless it is there already."""
    target = folder / f"{name}-{arch}.o"
    if not target.exists():
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}", *FLAGS]
        _run("nvcc", *flags, "-c", str(CUDA / f"{name}.cu"), "-o", str(target))
    return target


def kernels(file: Path) -> list[Kernel]:
    """All kernels of an object file."""
    tool = cuobjdump() or "cuobjdump"
    report = _run(tool, "-res-usage", str(file))
    usage = {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report
        )
    }
    found = []
    for part in re.split(r"Function : ", _run(tool, "-sass", str(file)))[1:]:
        name = part.split(maxsplit=1)[0]
        found.append(Kernel(name, *usage[name], tuple(read(part))))
    return found


def read(sass: str) -> list[Instruction]:
    """The instructions of one function's listing."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    return [
        Instruction(int(address, 16), guard or "", opcode, operands)
        for address, guard, opcode, operands in re.findall(pattern, sass, re.M)
    ]


def find(code: Sequence[Kernel], *parts: str) -> Kernel:
    """The one kernel whose mangled name has all `parts`, such as its name and a template argument's."""
    chosen = [kernel for kernel in code if all(part in kernel.name for part in parts)]
    if len(chosen) != 1:
        raise LookupError(f"{len(chosen)} kernels have {parts} in their names: {[kernel.name for kernel in code]}")
    return chosen[0]


def opcodes(instructions: Sequence[Instruction]) -> Counter[str]:
    """How often each opcode stands there, with its suffixes: {"LDG.E.128": 8, ...}."""
    return Counter(instruction.opcode for instruction in instructions)


def loops(kernel: Kernel) -> list[tuple[Instruction, ...]]:
    """The instructions of each innermost loop: from where a branch leads back to, up to that branch. Code that the
    compiler put outside of that run, such as a rare case's, is not counted."""
    spans = []
    for instruction in kernel.instructions:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands) if instruction.opcode.startswith("BRA") else None
        # the branch to itself pads the kernel's end
        if target and int(target[1], 16) < instruction.address:
            spans.append((int(target[1], 16), instruction.address))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [tuple(i for i in kernel.instructions if first <= i.address <= last) for first, last in inner]


def hot_loop(kernel: Kernel, opcode: str = WIDE) -> tuple[Instruction, ...]:
    """The innermost loop with the most instructions of `opcode`; of equals the shortest."""
    with_it = [loop for loop in loops(kernel) if opcodes(loop)[opcode]]
    if not with_it:
        raise LookupError(f"no innermost loop of {kernel.name} has {opcode}")
    return max(with_it, key=lambda loop: (opcodes(loop)[opcode], -len(loop)))


def loads_in_flight(loop: Sequence[Instruction], opcode: str = WIDE) -> int:
    """The most loads of `opcode` that are under way at once: issued, and none of their registers used yet. The loop is
    followed for two turns, so that loads for the next turn count; branches within it are taken to fall through."""
    width = int(opcode.rsplit(".", 1)[1]) // 32 if opcode[-1].isdigit() else 1
    pending: list[set[int]] = []
    most = 0
    for instruction in (*loop, *loop):
        used = {int(number) for number in re.findall(r"\bR(\d+)", instruction.operands)}
        pending = [registers for registers in pending if not registers & used]
        if instruction.opcode == opcode:
            first = int(re.match(r"R(\d+)", instruction.operands)[1])  # type: ignore[index]
            pending.append(set(range(first, first + width)))
            most = max(most, len(pending))
    return most


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def ways(kernel: Kernel, opcode: str, goal: str) -> list[tuple[Instruction, ...]]:
    """The shortest ways from the kernel's start through an instruction of `opcode` to the next one of `goal`, one for
    each that can be passed: what a thread runs that takes every branch around what it has no need of."""
    code, place = kernel.instructions, {i.address: n for n, i in enumerate(kernel.instructions)}

    def follow(start: int, ends) -> list[int]:
        before, queue = {start: start}, deque([start])
        while queue:
            n = queue.popleft()
            if n != start and ends(n):
                way = [n]
                while way[-1] != start:
                    way.append(before[way[-1]])
                return way[::-1]
            branch = re.search(r"0x([0-9a-f]+)$", code[n].operands) if code[n].opcode.startswith("BRA") else None
            after = [place[int(branch[1], 16)]] if branch else []
            always = code[n].opcode.startswith(("BRA", "EXIT")) and not code[n].guard and "P" not in code[n].operands
            for m in after if always else [*after, n + 1]:
                if m < len(code) and m not in before:
                    before[m] = n
                    queue.append(m)
        return []

    found = []
    for via in (n for n, i in enumerate(code) if i.opcode == opcode and not i.guard):
        first, rest = follow(0, lambda n, via=via: n == via), follow(via, lambda n: code[n].opcode.startswith(goal))
        if first and rest:
            found.append(tuple(code[n] for n in (*first, *rest[1:])))
    return sorted(found, key=len)
