"""Every Triton kernel compiled ahead of time as its launcher would have it: registers, spills, shared memory, WGMMA."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import machine_code  # noqa: E402
import triton  # noqa: E402
from machine_code import opcodes  # noqa: E402

from beagle_kernels.triton import configs  # noqa: E402
from bench import compiled  # noqa: E402
from bench.compiled import SHARED_LIMIT, Compiled, compiling_for  # noqa: E402

SLOW = pytest.mark.slow
SIZES = [pytest.param(64, marks=SLOW), 128]
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)]


def check(kernel: Compiled, arch: int, matrix: bool, spills: int = 0) -> None:
    assert kernel.spills <= spills, f"{kernel.name}: {kernel.spills} B a thread spilt, {kernel.registers} registers"
    assert kernel.shared <= SHARED_LIMIT[arch], f"{kernel.name}: {kernel.shared} bytes of shared memory"
    assert ("wgmma" in kernel.ptx) == (matrix and arch == 90), kernel.name


ARCHS = [80, 90, *(pytest.param(arch, marks=SLOW) for arch in (86, 100, 120))]
BLOCK = {
    "block_forward": "block_attention_forward",
    "block_dq": "block_attention_dq",
    "block_dkv": "block_attention_dkv",
}
"""The kernel of each row of the tables, in the order of launches."""
ON_SM_100 = {64: 64, 128: 8, 256: 0}
"""Bytes a thread that sm_100's kernels may spill, by head size: those of the tensor memory were tried least."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", SIZES)
def test_block_attention(head_size, dtype, arch):
    """Those of fp16, which differ from bf16's by the type alone, take a reach: it costs no spill, and any value of it
    has the same kernels."""
    with compiling_for(arch) as found:
        for reach in (None,) if dtype == torch.bfloat16 else (1, 16, 300, 2**40):
            compiled.block_attention(head_size, dtype, reach=reach)
    assert [kernel.name for kernel in found] == list(BLOCK.values())
    for kernel in found:
        check(kernel, arch, matrix=True, spills=ON_SM_100[head_size] if arch == 100 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_block_attention_of_wide_heads(arch):
    """D = 256 spills in one kernel only: sm_90's dK and dV, where no tile that uses WGMMA was found to fit."""
    with compiling_for(arch) as found:
        compiled.block_attention(256, torch.bfloat16)
    for kernel in found:
        check(kernel, arch, True, 168 if (kernel.name, arch) == ("block_attention_dkv", 90) else 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_size, most", [(64, 63), pytest.param(128, 128, marks=SLOW)])
def test_block_attention_in_float32(head_size, most, arch):
    with compiling_for(arch) as found:
        compiled.block_attention(head_size, torch.float32)
    assert len(found) == 3
    for kernel in found:
        assert kernel.spills <= most and kernel.shared <= SHARED_LIMIT[arch], kernel[:6]
        assert "tf32" in kernel.ptx, kernel.name


VARIANTS = [
    pytest.param("block_forward", "128x128x8x2", {"tma": True}),
    pytest.param("block_forward", "128x64x8x3", {"ahead": True}, marks=SLOW),
    pytest.param("block_forward", "128x64x8x3", {"tma": True, "ahead": True}),
    pytest.param("block_dq", "128x64x8x3", {"tma": True}, marks=SLOW),
    pytest.param("block_dkv", "64x64x8x2", {"tma": True}, marks=SLOW),
]


@pytest.mark.parametrize("name, tiles, options", VARIANTS)
def test_variants_of_block_attention(name, tiles, options, monkeypatch):
    """Tiles of D = 128 that `tune` may pick. With TMA the bulk copy engine brings every streamed block."""
    config = configs.Config(*map(int, tiles.split("x")), **options)
    assert config in configs.CANDIDATES[name][128]
    monkeypatch.setitem(configs._tuned, (name, 90, 128, torch.bfloat16), config)
    with compiling_for(90) as found:
        compiled.block_attention(128, torch.bfloat16)
    (kernel,) = (kernel for kernel in found if kernel.name == BLOCK[name])
    check(kernel, 90, matrix=True)
    assert [one.name for one in found if "cp.async.bulk.tensor.2d" in one.ptx] == [BLOCK[name]] * config.tma


@pytest.mark.slow
def test_candidates_keep_the_loop_in_registers(monkeypatch):
    """Whatever is spilt is spilt outside of the loop over whole tiles, the shortest of those that multiply: of its
    instructions 2% at most are loads and stores of spills with 3.6, by which they were chosen. Those that come nearest
    to it stand for all, which take minutes to compile."""
    spilling, most = [], 0.02 if triton.__version__.startswith("3.6.") else 0.05
    for config in configs.CANDIDATES["block_dkv"][128]:
        monkeypatch.setitem(configs._tuned, ("block_dkv", 90, 128, torch.bfloat16), config)
        with compiling_for(90) as found:
            compiled.block_attention(128, torch.bfloat16)
        (kernel,) = (kernel for kernel in found if kernel.name == BLOCK["block_dkv"])
        (code,) = machine_code.kernels(kernel.cubin)
        products = [loop for loop in map(opcodes, machine_code.loops(code)) if any("MMA" in opcode for opcode in loop)]
        whole = min(products, key=lambda loop: loop.total())
        if sum(whole[opcode] for opcode in whole if opcode.startswith(("LDL", "STL"))) > most * whole.total():
            spilling.append(config)
        assert kernel.shared <= SHARED_LIMIT[90], config
    assert not spilling


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size", SIZES)
def test_extend_attention(head_size, arch):
    with compiling_for(arch) as found:
        compiled.extend_attention(head_size, torch.bfloat16)
    assert len(found) == 2
    for kernel in found:
        check(kernel, arch, matrix=False)


MANY_AND_FEW = [60, pytest.param(8, marks=SLOW), pytest.param(4, marks=SLOW)]
"""Nodes, of 4 rows each: the tallest tile, and the two smallest."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [*SIZES, 256])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("nodes", MANY_AND_FEW)
def test_tree_attention(nodes, paged, head_size, dtype, arch):
    with compiling_for(arch) as found:
        compiled.tree_attention(head_size, dtype, nodes, paged)
    assert [kernel.name for kernel in found] == ["tree_attention_splits", "tree_attention_combine"]
    check(found[0], arch, matrix=nodes == 60)
    check(found[1], arch, matrix=False)


TREE_VARIANTS = {
    "window": {"starts": True},
    "sinks": {"sinks": True},
    "soft cap": {"softcap": 50.0},
    "all": {"starts": True, "sinks": True, "softcap": 50.0},
}


TREE_CASES = [
    # variant, nodes, paged, head size, values' head size
    *((name, 60, False, 128, 128) for name in TREE_VARIANTS),
    ("all", 8, False, 128, 128),
    ("all", 60, False, 192, 128),
    *(pytest.param(name, 60, True, 128, 128, marks=SLOW) for name in ("window", "all")),
    *(pytest.param(name, 60, False, 64, 64, marks=SLOW) for name in ("window", "all")),
    *(pytest.param(name, nodes, True, 128, 128, marks=SLOW) for name in ("window", "all") for nodes in (8, 4)),
    *(pytest.param("window", nodes, False, 192, 128, marks=SLOW) for nodes in (60, 8)),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name, nodes, paged, head_size, value_size", TREE_CASES)
def test_variants_of_tree_attention(name, nodes, paged, head_size, value_size, arch):
    """None costs a spill, except where 192 is padded to 256, in some."""
    with compiling_for(arch) as found:
        compiled.tree_attention(head_size, torch.bfloat16, nodes, paged, value_size, **TREE_VARIANTS[name])
    check(found[0], arch, matrix=nodes == 60, spills=64 if head_size == 192 else 0)
    check(found[1], arch, matrix=False)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size, most", [(64, 63), pytest.param(128, 128, marks=SLOW)])
@pytest.mark.parametrize("paged", [False, True])
def test_tree_attention_in_float32(paged, head_size, most, arch):
    with compiling_for(arch) as found:
        compiled.tree_attention(head_size, torch.float32, paged=paged)
    for kernel in found:
        check(kernel, arch, matrix=False, spills=most)


def test_tree_attention_compiles_once_for_all_lengths(monkeypatch):
    """However many splits the shapes and the device ask for, but for three sizes of their combination, whatever the
    lengths; with windows for any number of nodes of a word too."""
    from beagle_kernels.triton import tree_attention as kernels

    wanted = []
    monkeypatch.setattr(kernels, "splits_of", lambda *args: wanted[-1])
    with compiling_for(90) as found:
        for splits in (1, 2, 7, 16, 40, 65, 128):
            wanted.append(splits)
            compiled.tree_attention(64, torch.bfloat16)
    assert [kernel.name for kernel in found] == ["tree_attention_splits", *["tree_attention_combine"] * 3]
    wanted.append(7)
    with compiling_for(90) as found:
        for nodes in (60, 57, 64):
            compiled.tree_attention(64, torch.bfloat16, nodes, starts=True)
    assert len(found) == 2


@pytest.mark.parametrize("arch", [80, 90])
def test_distill_loss(arch):
    with compiling_for(arch) as found:
        compiled.distill_loss(64, torch.bfloat16)
    assert len(found) == 1
    check(found[0], arch, matrix=False)


def test_the_table_of_what_was_compiled(tmp_path, capsys):
    """Compiled anew, whatever Triton's cache holds."""
    for name in ("one.json", "other.json"):
        arguments = ["--launches", "distill_loss", "--archs", "80", "--head-sizes", "64", "--dtypes", "bfloat16"]
        assert compiled.main([*arguments, "--json", str(tmp_path / name)]) == 0
        (row,) = json.loads((tmp_path / name).read_text())
        assert row["kernel"] == "distill_loss_softmax" and row["seconds"] > 0 and row["spills"] == 0
        assert f"{row['registers']} registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "capability, row",
    [
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 6), 80),
        ((8, 9), 80),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 80),
        ((12, 1), 80),
    ],
)
def test_a_card_takes_the_last_row_that_is_not_newer(capability, row, monkeypatch):
    """sm_120 takes sm_80's, where it has none: it has neither WGMMA nor tensor memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    arch = configs.architecture(torch.device("cuda"))
    assert configs.choose("block_dkv", arch, 40, torch.float16) == configs.TABLE["block_dkv"][row][64]
    assert configs.choose("block_dq", arch, 128, torch.float32) == configs.FLOAT32["block_dq"][min(row, 90)][128]
    tree = 120 if arch >= 120 else row
    for kind in ("tree", "tree_few"):
        assert configs.choose(kind, arch, 256, torch.bfloat16) == configs.TABLE[kind][tree][256]
    assert all(arch >= 90 or not config.tma for config in configs.candidates("block_dkv", arch, 64, torch.bfloat16))


def test_a_kernel_that_does_not_fit_is_refused(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setitem(configs._tuned, ("tree", 80, 128, torch.bfloat16), configs.Config(64, 128, 4, 5))
    with compiling_for(80), pytest.raises(OutOfResources, match="shared memory"):
        compiled.tree_attention(128, torch.bfloat16)
