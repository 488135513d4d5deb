"""decoder_layer: PyTorch's accuracy at least, with all that a layer may have, on odd sizes and caches full of NaN."""

from __future__ import annotations

import forks
import layer_cases
import pytest
import torch
from closeness import close_as_eager
from instruction_sets import HERE, using
from layer_cases import case, eager, in_pages, mapped, run
from torch.library import opcheck

from beagle_kernels import BackendError, LayerWeights, Linear, decoder_layer
from beagle_kernels.decoder_layer import flat
from beagle_kernels.extension import missing_cpu
from beagle_kernels.reference.tree_attention import gather_pages

needs_extension = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32, weights in bfloat16": {"linear": torch.bfloat16},
}
DRAFT = {"norms": "draft", "of_output": True}
"""The draft's block: keys of what comes out, and only keys before it are seen."""
VARIANTS = {
    "plain": {},
    "one node": {"nodes": 1, "lengths": (0,)},
    "a tree of 40": {"nodes": 40, "lengths": (3, 0, 150)},
    "sizes that divide": {"width": 64, "head": 32, "inner": 128, "nodes": 8, "lengths": (64, 130), "hq": 6},
    "biases": {"biases": True, "norms": "none"},
    "query and key norms": {"norms": "qwen", "rotary": 10, "hkv": 1},
    "four norms": {"norms": "gemma", "activation": "gelu_tanh", "softcap": 2.0, "hkv": 4},
    "a window": {"starts": True, "lengths": (10, 100, 163), "nodes": 12},
    "a residual factor": {"residual": 0.22, "rotary": 0, "biases": True},
    "keys further on": {"write": 70, "lengths": (0, 5, 60)},
    "no keys": {"kept": False, "write": 9},
    "keys of output": DRAFT | {"write": 11},
    "an empty MLP": {"inner": 0},
    "no row": {"lengths": ()},
    "no node": {"nodes": 0},
}


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seen_of(plane: torch.Tensor, unwritten: torch.Tensor) -> torch.Tensor:
    """What was written of a plane: the rest is 0, and must be as it was."""
    kept = (plane == unwritten) | (plane.isnan() & unwritten.isnan())
    return plane.masked_fill(kept, 0.0)


@needs_extension
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_near_eager(variant, kind, pages, threads):
    """Out and what is written, against float64 at most twice the error of plain modules."""
    dense = case(**VARIANTS[variant], **KINDS[kind])
    given = in_pages(dense) if pages else dense
    exact, plain = run(mapped(given, torch.Tensor.double), backend="reference"), eager(dense)
    got = run(given, backend="cpu")
    assert got[0].dtype == given["x"].dtype
    if pages:  # what the table shows; where it names no page, what the row has there
        used = (given["block_table"] >= 0) & (given["block_table"] < len(given["keys"]))
        slots = used.repeat_interleave(layer_cases.PAGE, 1)[:, None, :, None]
        got, exact = (
            (
                out,
                *(
                    gather_pages(x, given["block_table"]).where(slots, dense["keys"][:0].new_zeros(()).to(x.dtype))
                    for x in planes
                ),
            )
            for out, *planes in (got, exact)
        )
        plain = plain[0], *(x.where(slots, x.new_zeros(())) for x in plain[1:])
    for what, found, usual, want in zip(("out", "keys", "values"), got, plain, exact, strict=True):
        close_as_eager(found.nan_to_num(0.0), usual.nan_to_num(0.0), want.nan_to_num(0.0), 2, f"{variant}: {what}")
    assert not got[0].isnan().any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_definition_is_that_of_plain_modules(variant):
    """In float64, where rounding hides nothing; slots that no node's token goes to stay as they were."""
    given = mapped(case(**VARIANTS[variant]), torch.Tensor.double)
    got, want = run(given, backend="reference"), eager(given)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert torch.equal(got[1].isnan(), want[1].isnan())


@needs_extension
@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_is_as_exact(kind, instructions):
    given = case(nodes=9, norms="gemma", activation="gelu_tanh", biases=True, starts=True, softcap=3.0, **KINDS[kind])
    with using(instructions):
        got = run(given, backend="cpu")
    exact, plain = run(mapped(given, torch.Tensor.double), backend="reference"), eager(given)
    for what, found, usual, want in zip(("out", "keys", "values"), got, plain, exact, strict=True):
        close_as_eager(found.nan_to_num(0.0), usual.nan_to_num(0.0), want.nan_to_num(0.0), 2, what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
@pytest.mark.parametrize("variant", ["plain", "keys further on", "keys of output"])
def test_what_is_written_and_what_is_not(variant, pages, backend):
    """The slots of the new tokens and no other, in memory that is full of NaN."""
    given = case(**VARIANTS[variant])
    given = mapped(given, lambda x: x.nan_to_num(5.0)) | {"x": given["x"]}
    given = in_pages(given) if pages else given
    before = [given[name] for name in ("keys", "values")]
    after = run(given, backend=backend)[1:]
    for old, new in zip(before, after):
        changed = (old != new) & ~(old.isnan() & new.isnan())
        count = len(given["x"]) * given["x"].shape[1] * old.shape[1] * old.shape[3]
        assert int(changed.sum()) == count
        if not pages:
            for b, length in enumerate(given["lengths"].tolist()):
                first = length + given["write"]
                assert changed[b, :, first : first + given["x"].shape[1]].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
def test_keys_past_the_cache_or_in_no_page_are_left_out(pages, backend):
    """Lengths beyond it, or so near its end that a part fits; a page that is none is not another one's."""
    given = case(nodes=7, lengths=(3, 20, 40), slack=0)
    slots = given["keys"].shape[2]
    given["lengths"] = torch.tensor([slots - 3, slots + 5, 2**31 - 1], dtype=torch.int32)
    given = mapped(given, lambda x: x.nan_to_num(1.0))
    exact = mapped(given, torch.Tensor.double)
    if pages:
        given, exact = (in_pages(call) for call in (given, exact))
        for call in (given, exact):
            call["block_table"][0, -1] = 99
    got, want = run(given, backend=backend), run(exact, backend="reference")
    plain = eager(given) if not pages else got
    close_as_eager(got[0], plain[0], want[0], 2, "out") if not pages else None
    changed = (got[1] != given["keys"]) & ~got[1].isnan()
    assert int(changed.sum()) == (0 if pages else 3 * 2 * 20)
    assert torch.equal(changed, (want[1] != exact["keys"]) & ~want[1].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_masks_of_any_value(backend):
    """Negative lengths count as 0, bits past the cache and starts anywhere do no harm: as the definition has it."""
    for seed in range(12):
        pick = torch.Generator().manual_seed(seed)
        given = mapped(case(nodes=6, lengths=(4, 9, 30), seed=seed, words=3), lambda x: x.nan_to_num(1.0))
        slots = given["keys"].shape[2]
        ends = torch.tensor([-(2**31), -1, 0, 1, slots - 2, slots, slots + 1, 2**31 - 1], dtype=torch.int32)
        given["lengths"] = ends[torch.randint(8, (3,), generator=pick)]
        given["mask"] = torch.randint(-(2**63), 2**63 - 1, given["mask"].shape, generator=pick)
        given["starts"] = ends[torch.randint(8, (3, 6), generator=pick)] if seed % 3 else None
        got, want = run(given, backend=backend), run(mapped(given, torch.Tensor.double), backend="reference")
        for one, two in zip(got, want):
            torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_without_columns_shows_nothing(backend):
    given = mapped(case(nodes=3, lengths=(0, 30, 9)), lambda x: x.nan_to_num(1.0))
    empty = given | {name: given[name][:, :, :0] for name in ("keys", "values")}
    pages = given | {"block_table": torch.zeros(3, 0, dtype=torch.int32)}
    pages |= {name: given[name][:1] for name in ("keys", "values")}
    got, want = run(pages, backend=backend), run(empty, backend=backend)
    assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1:], (pages["keys"], pages["values"])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_sees_what_is_before_its_window(backend):
    """NaN between a block's first slot and the first start, and what one node sees and another does not."""
    given = case(nodes=3, lengths=(200,)) | {"starts": torch.tensor([[100, 101, 130]], dtype=torch.int32)}
    given["keys"][:, :, 64:100], given["values"][:, :, 64:100] = float("nan"), float("nan")
    assert not run(given, backend=backend)[0].isnan().any()
    given["starts"][:] = 300
    assert not run(given, backend=backend)[0].isnan().any()
    if backend == "cpu":
        given["starts"][:] = torch.tensor([[100, 101, 130]])
        given["values"][:, :, 100:130] = float("nan")
        out = run(given, backend=backend)[0]
        assert out[0, :2].isnan().all() and not out[0, 2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF])
def test_a_nan_of_any_payload_stays_one_and_in_its_row(bits, backend):
    given = case(nodes=4, lengths=(5, 40, 17), norms="qwen")
    clean = run(given, backend=backend)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for name in ("x", "keys", "values"):
        spoiled = given | {name: given[name].clone()}
        spoiled[name][1, :, 3] = nan
        out = run(spoiled, backend=backend)
        for one, two in zip(clean, out):
            assert torch.equal(one[[0, 2]].nan_to_num(9.0), two[[0, 2]].nan_to_num(9.0))
        assert out[0][1, 3].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draft", [False, True], ids=["layer", "draft"])
def test_strides_change_nothing(draft, backend):
    given = case(biases=True, **(DRAFT | {"write": 5} if draft else {"norms": "qwen"}))
    want = run(given, backend=backend)
    layouts = {
        "reverse": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
        "every other": lambda x: torch.stack([x, x], -1)[..., 0],
        "a part": lambda x: torch.nn.functional.pad(x, [1, 2] * x.dim(), value=77)[
            tuple(slice(1, 1 + size) for size in x.shape)
        ],
    }
    for layout in layouts.values():
        odd = mapped(given, layout)
        odd |= {name: layout(given[name]) for name in ("lengths", "mask")}
        got = run(odd, backend=backend)
        if backend == "cpu":
            assert all(torch.equal(one.nan_to_num(9.0), two.nan_to_num(9.0)) for one, two in zip(got, want))
        torch.testing.assert_close(got, want, equal_nan=True)
    wide = mapped(given, lambda x: x[:1].expand_as(x) if x.dim() == 3 else x)
    torch.testing.assert_close(
        run(wide, backend=backend), run(mapped(wide, torch.clone), backend=backend), equal_nan=True
    )


@needs_extension
def test_gate_and_up_in_different_dtypes():
    """Where bf16 holds one of two weights exactly and not the other: the steps of their products differ."""
    given = case(width=100, inner=3000, nodes=3)
    layer = given["layer"]
    want = None
    for wide in ((), ("gate",), ("up",), ("q", "v"), ("k", "o", "down")):
        kinds = {
            name: Linear(getattr(layer, name).weight.bfloat16().to(torch.float32 if name in wide else torch.bfloat16))
            for name in LayerWeights._fields[:7]
        }
        got = run(given | {"layer": layer._replace(**kinds)}, backend="cpu")[0]
        want = got if want is None else want
        assert torch.equal(got, want), wide


def op_arguments(given, backend):
    more = None, given.get("starts"), 0.3, given["softcap"], given["write"], given["keys_of_output"]
    names = "cos", "sin", "keys", "values", "lengths", "mask"
    return given["x"], *flat(given["layer"]), *(given[name] for name in names), *more, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    given = mapped(case(norms="qwen", starts=True, softcap=2.0), lambda x: x.nan_to_num(0.0))
    opcheck(torch.ops.beagle.decoder_layer.default, op_arguments(given, backend))
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    opcheck(torch.ops.beagle.decoder_layer.default, op_arguments(given, backend))


def test_compiles_in_one_graph():
    given = case(biases=True, norms="gemma")
    want = run(given)
    compiled = torch.compile(lambda call: decoder_layer(**call) * 2, fullgraph=True, backend="aot_eager")
    given = given | {name: given[name].clone() for name in ("keys", "values")}
    assert torch.equal(compiled(given), want[0] * 2)
    assert torch.equal(given["keys"].nan_to_num(9.0), want[1].nan_to_num(9.0))


@needs_extension
def test_backends_say_why_not():
    given = case()
    with pytest.raises(BackendError, match="decoder_layer has no triton implementation"):
        decoder_layer(**given, backend="triton")
    with pytest.raises(BackendError, match="decoder_layer: backend 'cpu' cannot serve .*: it has no float64"):
        decoder_layer(**mapped(given, torch.Tensor.double), backend="cpu")
    wide = mapped(given, torch.Tensor.double)
    for one, two in zip(run(wide), run(wide, backend="reference")):
        assert torch.equal(one.nan_to_num(9.0), two.nan_to_num(9.0))


@needs_extension
def test_in_a_child_after_a_fork():
    given = case(width=128, inner=512, nodes=8)
    torch.set_num_threads(3)
    want = run(given, backend="cpu")[0]
    torch.set_num_threads(1)

    def again():
        torch.set_num_threads(3)
        assert torch.equal(run(given, backend="cpu")[0], want)

    assert forks.run(again) == 0
