"""Every Triton kernel compiled ahead of time for sm_80 and sm_90, with the shipped configurations, on any machine."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from triton_aot import SHARED_LIMIT, Compiled, compile_for  # noqa: E402

from beagle_kernels.triton import block_attention, configs, distill_loss, extend_attention, tree_attention  # noqa: E402

POINTERS = {
    **dict.fromkeys("p_q p_k p_v p_out p_g p_dq p_dk p_dv p_merged p_dout p_z p_t".split(), "bf16"),
    **dict.fromkeys("p_lse p_h p_delta p_merged_lse p_dlse p_part p_part_lse p_weight p_loss".split(), "fp32"),
    **dict.fromkeys("p_offset p_cu p_lengths p_table".split(), "i32"),
    "p_mask": "i64",
}
HEADS = {"HQ": 32, "GROUP": 4}
BLOCK_KERNELS = {
    "block_forward": (block_attention.forward_kernel, {}),
    "block_dq": (block_attention.dq_kernel, {"HAS_H": True}),
    "block_dkv": (block_attention.dkv_kernel, {}),
}
STREAMED = {"block_forward": ("p_k", "p_v"), "block_dq": ("p_k", "p_v"), "block_dkv": ("p_q", "p_g")}
SIZES = [pytest.param(64, marks=pytest.mark.slow), 128]


def check(compiled, arch: int, matrix: bool) -> None:
    assert compiled.spills == 0, f"{compiled.spills} bytes a thread in local memory, {compiled.registers} registers"
    assert compiled.shared <= SHARED_LIMIT[arch], f"{compiled.shared} bytes of shared memory"
    assert ("wgmma" in compiled.ptx) == (matrix and arch == 90)


def compile_block(name: str, head_size: int, arch: int, config: configs.Config) -> Compiled:
    """The packed variant, which holds more than the one for a single sequence."""
    kernel, more = BLOCK_KERNELS[name]
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STEPS": 8, "TMA": config.tma}
    constants = HEADS | {"D": head_size, "BLOCK_D": head_size} | tiles | more
    described = dict.fromkeys(STREAMED[name] if config.tma else (), f"tensordesc<bf16[{config.block_n}, {head_size}]>")
    return compile_for(arch, kernel, POINTERS | described, constants, config.warps, config.stages)


def compile_tree(head_size: int, arch: int, config: configs.Config, paged: bool) -> Compiled:
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "WORDS": 1, "PAGED": paged}
    constants = HEADS | {"D": head_size, "BLOCK_D": head_size} | tiles
    pointers = POINTERS if paged else POINTERS | {"p_table": None}
    return compile_for(arch, tree_attention.split_kernel, pointers, constants, config.warps, config.stages)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("name", BLOCK_KERNELS)
def test_block_attention(name, head_size, arch):
    check(compile_block(name, head_size, arch, configs.TABLE[name][arch][head_size]), arch, matrix=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", BLOCK_KERNELS)
def test_block_attention_of_wide_heads(name, arch):
    """D = 256 spills in one kernel only: sm_90's dK and dV, where no tile that uses WGMMA was found to fit."""
    compiled = compile_block(name, 256, arch, configs.TABLE[name][arch][256])
    if (name, arch) == ("block_dkv", 90):
        assert compiled.spills <= 168
        compiled = compiled._replace(spills=0)
    check(compiled, arch, matrix=True)


FASTEST_BY_TMA = [
    pytest.param("block_forward", "128x128x8x2"),
    pytest.param("block_dq", "128x64x8x3", marks=pytest.mark.slow),
    pytest.param("block_dkv", "128x32x8x3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, tiles", FASTEST_BY_TMA)
def test_block_attention_by_tma(name, tiles):
    """Tiles of D = 128 that `tune` may pick: the bulk copy engine brings every streamed block."""
    config = configs.Config(*map(int, tiles.split("x")), tma=True)
    assert config in configs.CANDIDATES[name][128]
    compiled = compile_block(name, 128, 90, config)
    check(compiled, 90, matrix=True)
    assert "cp.async.bulk.tensor.2d" in compiled.ptx


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_extend_attention(name, head_size, arch):
    tile = {"BLOCK_R": extend_attention.TILE // (4 * head_size), "BLOCK_G": 4, "BLOCK_D": head_size}
    constants = HEADS | {"D": head_size} | tile | ({"HAS_H": True} if name == "backward_kernel" else {})
    check(compile_for(arch, getattr(extend_attention, name), POINTERS, constants, 4, 3), arch, matrix=False)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("paged", [False, True])
def test_tree_attention(paged, head_size, arch):
    check(compile_tree(head_size, arch, configs.TABLE["tree"][arch][head_size], paged), arch, True)


@pytest.mark.parametrize("arch", [80, 90])
def test_combine(arch):
    constants = {"HQ": 32, "D": 128, "BLOCK_D": 128}
    check(compile_for(arch, tree_attention.combine_kernel, POINTERS, constants, 4, 1), arch, matrix=False)


@pytest.mark.parametrize("arch", [80, 90])
def test_distill_loss(arch):
    constants = {"GRADIENT": True, "BLOCK_V": distill_loss.BLOCK}
    check(compile_for(arch, distill_loss.softmax_kernel, POINTERS, constants, 8, 3), arch, matrix=False)
