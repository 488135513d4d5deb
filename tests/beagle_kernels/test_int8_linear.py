"""int8_linear: the definition's bits on every instruction set, and a row's result whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import HERE, using
from layer_cases import case, run
from torch import Tensor
from torch.library import opcheck

from beagle_kernels import BackendError, LayerWeights, Linear, decoder_layer, int8_linear
from beagle_kernels.extension import missing_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
SHAPES = [(1, 32, 32), (33, 64, 64), (18, 96, 32), (5, 96, 96), (50, 640, 160), (113, 576, 64), (40, 2048, 2048)]
"""Outputs, width, group."""


def layer(outputs: int, width: int, group: int) -> tuple[Tensor, Tensor]:
    """A weight with all integers there are, and scales."""
    return torch.randint(-128, 128, (outputs, width), dtype=torch.int8), torch.rand(outputs, width // group) / 64


def odd_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows with what a quantisation may stumble over: none, denormal, tiny, huge, not finite, halves, one large."""
    x = torch.randn(rows, width)
    x[1], x[2], x[3, 3] = 0, 1e-40, torch.nan
    x[4, 0], x[5, width // 2] = torch.inf, -torch.inf
    x[6] *= 1e-30
    x[7] = torch.arange(width) % 255 / 2 - 63.5
    x[7, :32] = 63.5  # multiples of a half, the largest 127 halves
    x[8, ::32] = -40
    x[9] = 3e38
    return x.to(dtype)


def same(have: Tensor, want: Tensor) -> bool:
    """Bit for bit, but for what a NaN's bits and a zero's sign are."""
    return bool(((have == want) | (have.isnan() & want.isnan())).all())


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, width, group", SHAPES)
def test_the_definition_s_bits_for_any_number_of_rows(outputs, width, group, dtype, instructions):
    """On every instruction set, number of rows, place and number of threads, and for any part of the weight."""
    (weight, scales), x = layer(outputs, width, group), odd_rows(40, width, dtype)
    want = int8_linear(x, weight, scales, backend="reference")
    assert want[3:6].isnan().all() and not want[1].any()
    before = torch.get_num_threads()
    try:
        with using(instructions):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for rows in (*range(1, 19), 24, 33, 40):
                    assert same(int8_linear(x[40 - rows :], weight, scales, backend="cpu"), want[40 - rows :])
                    assert same(int8_linear(x[:rows], weight, scales, backend="cpu"), want[:rows])
            for first in (1, 5, 16):
                assert same(int8_linear(x[:5], weight[first:], scales[first:], backend="cpu"), want[:5, first:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, width, group", SHAPES[1:6])
def test_what_it_says(outputs, width, group, dtype, backend):
    """Against the same written out by loops, in integers, and near the product with the weight that it stands for."""
    (weight, scales), x = layer(outputs, width, group), torch.randn(3, width).to(dtype)
    got = int8_linear(x, weight, scales, backend=backend)
    assert got.dtype == dtype and got.shape == (3, outputs)
    groups = x.float().view(3, -1, group)
    for m in range(3):
        sums = torch.zeros(outputs)
        for g, part in enumerate(groups[m]):
            largest = part.abs().max()
            inverse = torch.tensor(127.0) / largest
            integers = [round(float(one * inverse)) for one in part]  # Python's rounds halves to even
            assert max(map(abs, integers)) == 127
            dot = (weight.view(outputs, -1, group)[:, g].long() * torch.tensor(integers)).sum(1)
            sums += dot.float() * (largest / torch.tensor(127.0) * scales[:, g])
        assert torch.equal(got[m], sums.to(dtype))
    weights = weight.view(outputs, -1, group).double() * scales.double()[..., None]
    exact = x.double() @ weights.flatten(1).T
    # rounding moves an element by half a step at most: a 254th of its group's largest
    assert (got.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_verifying_several_tokens_rounds_as_one_at_a_time_does(backend):
    (weight, scales), x = layer(70, 128, 64), torch.randn(2, 7, 128)
    whole = int8_linear(x, weight, scales, backend=backend)
    assert torch.equal(
        whole, torch.stack([int8_linear(row, weight, scales, backend=backend) for row in x.unbind(1)], 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype, backend):
    for rows, outputs, width in [(0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0)]:
        weight, scales = layer(outputs, width, 32)
        got = int8_linear(torch.randn(rows, width).to(dtype), weight, scales, backend=backend)
        assert got.shape == (rows, outputs) and got.dtype == dtype and not got.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    weight, scales = layer(24, 64, 32)
    views = (
        torch.randn(64, 5).T,
        torch.randn(1, 64).expand(6, 64),
        torch.randn(4, 128)[:, ::2],
        torch.randn(3, 9, 64)[:, 4],
    )
    for x in (torch.randn(64), torch.randn(2, 3, 64), *views):
        want = int8_linear(x.contiguous(), weight, scales, backend="reference")
        assert torch.equal(int8_linear(x, weight, scales, backend=backend), want)
    x = torch.randn(5, 64)
    wide = torch.full((26, 96), 55, dtype=torch.int8)
    wide[1:25, 16:80] = weight
    want = int8_linear(x, weight, scales, backend="reference")
    for view in (wide[1:25, 16:80], weight.T.contiguous().T):
        for some in (scales, scales.T.contiguous().T):
            assert torch.equal(int8_linear(x, view, some, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_row_and_its_output(backend):
    (weight, scales), x = layer(19, 64, 32), torch.randn(5, 64)
    plain = int8_linear(x, weight, scales, backend=backend)
    x[2, 40], scales[7, 0] = torch.nan, torch.inf
    got = int8_linear(x, weight, scales, backend=backend)
    assert got[2].isnan().all() and not got[:, 7].isfinite().any()
    left, kept = [0, 1, 3, 4], [n for n in range(19) if n != 7]
    assert torch.equal(got[left][:, kept], plain[left][:, kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    opcheck(torch.ops.beagle.int8_linear.default, (torch.randn(2, 3, 64), *layer(5, 64, 32), backend))


def test_compiles_in_one_graph():
    x, (weight, scales) = torch.randn(3, 64), layer(5, 64, 32)
    compiled = torch.compile(lambda *args: int8_linear(*args) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scales), int8_linear(x, weight, scales) * 2)


def test_bad_inputs():
    x, (weight, scales) = torch.randn(3, 64), layer(5, 64, 32)
    columns = (
        "weight has {} columns and scales has {}; allowed: one scale for each G columns of a row, G a multiple of 32"
    )
    for args, error, message in [
        ((x[:, :63], weight, scales), ValueError, r"x has shape \[3, 63\]; allowed: \[3, 64\]"),
        ((x, weight[0], scales), ValueError, r"weight has shape \[64\]"),
        ((x, weight.float(), scales), TypeError, "weight is float32; allowed: int8"),
        ((x, weight, scales[:4]), ValueError, r"scales has shape \[4, 2\]; allowed: \[5, any\]"),
        ((x, weight, scales.bfloat16()), TypeError, "scales is bfloat16; allowed: float32"),
        ((x, weight, scales[:, :0]), ValueError, columns.format(64, 0)),
        ((x, weight, scales.repeat(1, 2)), ValueError, columns.format(64, 4)),
        ((x[:, :50], weight[:, :50], scales[:, :1]), ValueError, columns.format(50, 1)),
        ((x.double(), weight, scales), TypeError, "x is float64; allowed: float32, float16, bfloat16"),
        ((None, weight, scales), TypeError, "x is a NoneType"),
        ((x, weight.to("meta"), scales), ValueError, "weight on meta"),
    ]:
        with pytest.raises(error, match=message):
            int8_linear(*args)
    with pytest.raises(BackendError, match="int8_linear has no triton implementation"):
        int8_linear(x, weight, scales, backend="triton")


@needs_extension
def test_the_extension_refuses_groups_of_its_own_too():
    from beagle_kernels.extension import _C

    with pytest.raises(RuntimeError, match="int8_linear: groups of 48 elements of 96; allowed: multiples of 32"):
        _C.cpu.int8_linear(1, 0, 0, 0, 0, 0, 0, 0, 96, 48, 96, 96)


def test_a_weight_that_was_rounded_to_integers_is_met():
    """The op's and the layer's own idea of a scale are one: an identity comes out within half a step."""
    x = torch.randn(4, 64)
    got = int8_linear(x, torch.eye(64, dtype=torch.int8) * 127, torch.full((64, 1), 1 / 127))
    assert (got - x).abs().max() <= x.abs().amax() / 254 * 1.001
    assert F.cosine_similarity(got, x).min() > 0.999


def in_int8(one: Linear, group: int = 32) -> Linear:
    groups = one.weight.float().unflatten(1, (-1, group))
    scales = groups.abs().amax(-1) / 127
    return Linear((groups / scales[..., None]).round().to(torch.int8).flatten(1), one.bias, scales)


def layer_in_int8(given: LayerWeights) -> LayerWeights:
    return given._replace(**dict(zip(given._fields, map(in_int8, given.linears))))


INT8_LAYER = {"width": 96, "head": 32, "inner": 160, "biases": True, "norms": "qwen", "nodes": 6}


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_layer_in_int8(dtype):
    """As defined, but for values that another order of summation rounds to another integer; and a row's bits are its
    own, whatever rows come with it."""
    given = case(dtype=dtype, **INT8_LAYER)
    given["layer"] = layer_in_int8(given["layer"])
    found = run(given, backend="cpu")[0]
    want = run(given, backend="reference")[0]
    assert (found - want).float().norm() <= 0.02 * want.float().norm()
    of_rows = ("x", "cos", "sin", "keys", "values", "lengths", "mask")
    for row in range(len(given["x"])):
        alone = run(given, **{name: given[name][row : row + 1] for name in of_rows}, backend="cpu")[0]
        assert torch.equal(alone, found[row : row + 1])


@pytest.mark.parametrize("names, says", [("k", "q, k and v"), ("up", "gate and up")])
def test_layers_that_read_the_same_rows_are_in_int8_together(names, says):
    given = case(**INT8_LAYER)
    whole = layer_in_int8(given["layer"])
    usual = getattr(given["layer"], names)
    for odd in (usual, in_int8(usual, 96)):
        given["layer"] = whole._replace(**{names: odd})
        with pytest.raises(ValueError, match=f"decoder_layer: {says} have .* allowed: all in int8 with as many"):
            decoder_layer(**given)
