"""skinny_linear: PyTorch's accuracy at least, and a row's result whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import HERE, using
from torch.library import opcheck

from beagle_kernels import BackendError, skinny_linear
from beagle_kernels.extension import _C, missing_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, width", [(1, 1), (63, 113), (113, 1025), (1025, 63), (576, 576), (18, 1536)])
def test_error_near_eager(outputs, width, dtype, backend):
    """Against float64 at most twice F.linear's error."""
    weight = draw(outputs, width, dtype=dtype)
    for rows in (1, 2, 3, 5, 8, 13, 63):
        x = draw(rows, width, dtype=dtype)
        want = x.double() @ weight.double().T
        got, eager = skinny_linear(x, weight, backend=backend), F.linear(x, weight)
        assert got.dtype == dtype and got.shape == want.shape
        error, allowed = ((y.double() - want).norm() / want.norm() for y in (got, eager))
        assert error <= 2 * max(allowed, torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, width", [(576, 576), (113, 200), (1536, 63), (50, 1025), (33, 48)])
def test_a_row_does_not_depend_on_the_others(outputs, width, dtype, instructions):
    """Bit for bit, for any number of rows, place and number of threads, and any part of the weight."""
    x, weight = draw(40, width, dtype=dtype), draw(outputs, width, dtype=dtype)
    before = torch.get_num_threads()
    try:
        with using(instructions):
            alone = torch.cat([skinny_linear(row, weight, backend="cpu") for row in x.split(1)])
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for rows in range(1, 41):
                    assert torch.equal(skinny_linear(x[40 - rows :], weight, backend="cpu"), alone[40 - rows :])
            for first in (1, 5, 16):
                assert torch.equal(skinny_linear(x[:5], weight[first:], backend="cpu"), alone[:5, first:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_as_exact(dtype, instructions):
    x, weight = draw(13, 200, dtype=dtype), draw(50, 200, dtype=dtype)
    want = x.double() @ weight.double().T
    with using(instructions):
        for rows in (1, 2, 4, 13):
            got = skinny_linear(x[:rows], weight, backend="cpu")
            eager = F.linear(x[:rows], weight)
            error, allowed = ((y.double() - want[:rows]).norm() for y in (got, eager))
            assert error <= 2 * max(allowed, torch.finfo(dtype).eps / 4 * want[:rows].norm())
            assert not skinny_linear(torch.zeros_like(x[:rows]), weight, backend="cpu").any()


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("outputs, width", [(576, 576), (113, 200), (96, 63), (50, 1025), (33, 48)])
def test_a_weight_in_bfloat16_is_the_same_weight_in_float32(outputs, width, instructions):
    """Bit for bit, for any number of rows and threads, and so a row's result does not depend on the others."""
    x, weight = draw(40, width), draw(outputs, width, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        with using(instructions):
            want = skinny_linear(x, weight.float(), backend="cpu")
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for rows in range(1, 41):
                    got = skinny_linear(x[40 - rows :], weight, backend="cpu")
                    assert got.dtype == torch.float32 and torch.equal(got, want[40 - rows :])
            assert torch.equal(skinny_linear(x[:5], weight[5:], backend="cpu"), want[:5, 5:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_in_bfloat16_of_any_layout(backend):
    """Empty, strided and with what is no number; denormals count, which products of bf16 itself take for zero."""
    for rows, outputs, width in [(0, 5, 7), (3, 0, 7), (3, 5, 0)]:
        got = skinny_linear(draw(rows, width), draw(outputs, width, dtype=torch.bfloat16), backend=backend)
        assert got.shape == (rows, outputs) and got.dtype == torch.float32 and not got.any()
    x, wide = draw(5, 40), draw(48, 90).bfloat16()
    for weight in (wide[:, 7:47], wide[::2, :40], wide.T[:90, :40], wide[:1, :40].expand(24, 40)):
        torch.testing.assert_close(skinny_linear(x, weight, backend=backend), F.linear(x, weight.float()))
    weight = wide[:20, :40].contiguous()
    weight[3, 5], weight[4, 6], x[2, 1] = torch.nan, 2.0**-130, torch.inf
    got = skinny_linear(x, weight, backend=backend)
    assert got[:, 3].isnan().all() and not got[:2, 4:].isnan().any() and not got[2, 4:].isfinite().any()
    tiny = torch.full((16, 16), 2.0**-130, dtype=torch.bfloat16)
    got = skinny_linear(torch.full((3, 16), 2.0**100), tiny, backend=backend)
    assert torch.equal(got, torch.full((3, 16), 2.0**-26))
    opcheck(torch.ops.beagle.skinny_linear.default, (x, wide[:20, :40], backend))


@needs_extension
def test_an_instruction_set_that_is_not_there():
    with pytest.raises(ValueError, match=f"instruction set is 'mmx'; allowed here: {', '.join(HERE)}$"):
        _C.use_instruction_set("mmx")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype, backend):
    for rows, outputs, width in [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)]:
        got = skinny_linear(draw(rows, width, dtype=dtype), draw(outputs, width, dtype=dtype), backend=backend)
        assert got.shape == (rows, outputs) and not got.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    weight = draw(24, 40)
    views = draw(40, 5).T, draw(1, 40).expand(6, 40), draw(4, 80)[:, ::2], draw(3, 9, 40)[:, 4]
    for x in (draw(40), draw(2, 3, 40), *views):
        torch.testing.assert_close(skinny_linear(x, weight, backend=backend), F.linear(x, weight))
    x = draw(5, 40)
    for weight in (draw(40, 24).T, draw(24, 90)[:, 7:47], draw(1, 40).expand(24, 40), draw(48, 40)[::2]):
        torch.testing.assert_close(skinny_linear(x, weight, backend=backend), F.linear(x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [50, 64])
def test_what_lies_around_is_not_used(width, dtype, backend):
    """NaN beside x and the weight stays there; inside it comes out where it belongs."""
    x, weight = torch.full((7, 96), torch.nan, dtype=dtype), torch.full((19, 96), torch.nan, dtype=dtype)
    x[1:6, 8 : 8 + width], weight[1:18, 8 : 8 + width] = draw(5, width, dtype=dtype), draw(17, width, dtype=dtype)
    x, weight = x[1:6, 8 : 8 + width], weight[1:18, 8 : 8 + width]
    torch.testing.assert_close(skinny_linear(x, weight, backend=backend), F.linear(x, weight), rtol=0.02, atol=0.02)
    weight[3, 5], x[2, 1] = torch.nan, torch.inf
    got = skinny_linear(x, weight, backend=backend)
    assert got[:, 3].isnan().all() and not got[:2, 4:].isnan().any() and not got[2, 4:].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    opcheck(torch.ops.beagle.skinny_linear.default, (draw(2, 3, 16), draw(5, 16), backend))


def test_compiles_in_one_graph():
    x, weight = draw(3, 16), draw(5, 16)
    compiled = torch.compile(lambda *args: skinny_linear(*args) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight) * 2)


def test_bad_inputs():
    x, weight = draw(3, 16), draw(5, 16)
    for args, error, message in [
        ((x[:, :15], weight), ValueError, r"x has shape \[3, 15\]; allowed: \[3, 16\]"),
        ((x, weight[0]), ValueError, r"weight has shape \[16\]"),
        ((x.bfloat16(), weight), TypeError, "x is bfloat16; allowed: float32$"),
        ((x.half(), weight.bfloat16()), TypeError, "x is float16; allowed: bfloat16, float32"),
        ((x, weight.half()), TypeError, "x is float32; allowed: float16"),
        ((x.double(), weight.bfloat16()), TypeError, "x is float64; allowed: bfloat16, float32"),
        ((x.double(), weight.double()), TypeError, "weight is float64"),
        ((x[0, 0], weight), ValueError, r"x has shape \[\]; allowed: \[16\]"),
        ((None, weight), TypeError, "x is a NoneType"),
        ((x, weight.to("meta")), ValueError, "weight on meta"),
    ]:
        with pytest.raises(error, match=message):
            skinny_linear(*args)
    with pytest.raises(BackendError, match="skinny_linear has no cuda implementation"):
        skinny_linear(x, weight, backend="cuda")
