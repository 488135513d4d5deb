"""What nvcc makes of the CUDA half: registers, spills and the instructions of kernels, for GPUs that are not there."""

from __future__ import annotations

import shutil

import machine_code
import pytest
from machine_code import CUDA, Kernel, find, hot_loop, loads_in_flight, loops, opcodes, read, ways

ARCHS = ("80", "90")
HOT = sorted(path.stem for path in CUDA.glob("*.cu") if path.stem != "why_not")
"""The files whose kernels may neither spill nor use local memory: all with an op in them."""

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;   /* 0x0000000402047981 */
        /*0030*/                   IADD3 R12, R9, 0x1, RZ ;                /* 0x0000000402047981 */
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64+0x20] ;   /* 0x0000000402047981 */
        /*0050*/               @P1 BRA 0x10 ;                              /* 0x0000000402047981 */
        /*0060*/                   EXIT ;                                  /* 0x0000000402047981 */
        /*0070*/                   BRA 0x70;                               /* 0x0000000402047981 */
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Gives a file's kernels on an architecture; each is compiled once for the module."""
    if not CUDA.is_dir():
        pytest.skip("the sources of csrc are not beside the package")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    if machine_code.cuobjdump() is None:
        pytest.skip("cuobjdump is not here: neither CUDA's nor Triton's")
    folder = tmp_path_factory.mktemp("machine_code")
    return lambda name, arch: machine_code.kernels(machine_code.assembled(name, arch, folder))


def test_a_listing_is_read_with_its_loops_and_its_loads():
    kernel = Kernel("kernel", 16, 0, 0, tuple(read(LISTING)))
    assert [instruction.address for instruction in kernel.instructions] == list(range(0, 0x80, 0x10))
    assert kernel.instructions[2][1:] == ("@!P0", "LDG.E.128", "R8, desc[UR4][R2.64+0x10]")
    (loop,) = loops(kernel)
    assert [instruction.address for instruction in loop] == [0x10, 0x20, 0x30, 0x40, 0x50]
    assert opcodes(loop)["LDG.E.128"] == 3 and hot_loop(kernel) == loop
    # R8 is loaded, used, and loaded again; R4 of the first turn is overwritten in the second
    assert loads_in_flight(loop) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", HOT)
def test_kernels_neither_spill_nor_use_local_memory(code, name, arch):
    found = code(name, arch)
    assert found
    for kernel in found:
        local = [opcode for opcode in opcodes(kernel.instructions) if opcode.startswith(("LDL", "STL"))]
        assert kernel.local == 0 and not local, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_cache_moves_sixteen_bytes_an_instruction_and_eight_loads_at_once(code, arch):
    kernel = find(code("compact_cache", arch), "move_columns", "Sixteen")
    moves = opcodes(kernel.instructions)
    assert moves["LDG.E.128"] == moves["STG.E.128"] == 8
    assert not [opcode for opcode in moves if opcode.startswith(("LDG", "STG")) and opcode.endswith(("U8", "S8"))]
    assert loads_in_flight(hot_loop(kernel)) == 8
    words = opcodes(find(code("compact_cache", arch), "move_columnsIj").instructions)
    assert words["STG.E"] == 8 and not [opcode for opcode in words if opcode.endswith("U8")]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("name", "kernel"), [("choose_tokens", "scan_chunks"), ("verify_tree", "scan_nodes")])
def test_a_greedy_row_is_read_by_wide_loads_at_once_in_few_instructions(code, arch, name, kernel):
    for dtype, registers, a_token in (("INS_6BFloat", 48, 5.5), ("INS_4Half", 48, 6.5), ("If", 64, 8.5)):
        scan = find(code(name, arch), kernel + dtype)
        assert scan.registers <= registers
        # of a thread that has whole, aligned vectors and draws no noise, which takes 32 tokens
        greedy = next(way for way in ways(scan, "LDG.E.128", "BAR") if opcodes(way)["LDG.E.128"] >= 4)
        assert loads_in_flight(greedy) >= 4
        assert len(greedy) <= 32 * a_token
