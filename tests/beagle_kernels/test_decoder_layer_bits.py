"""decoder_layer bit for bit, whatever rows, nodes, threads, pages or layers stand beside; and what it refuses."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from instruction_sets import HERE, using
from layer_cases import case, in_pages, mapped, packed, run, weights

from beagle_kernels import LayerWeights, Linear, Norm, decoder_layer
from beagle_kernels.decoder_layer import flat
from beagle_kernels.extension import DTYPES, missing_cpu

needs_extension = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")

if DTYPES:
    from beagle_kernels.compiled.decoder_layer import Layers, Parts

KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32, weights in bfloat16": {"linear": torch.bfloat16},
}
ALL = {"norms": "gemma", "biases": True, "rotary": 12, "softcap": 3.0}


@pytest.fixture
def threads():
    """Sets how many work; as it was before at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows_of(given, b):
    """The call of row b alone."""
    parts = ("x", "cos", "sin", "keys", "values", "lengths", "mask", "starts", "block_table")
    if given.get("block_table") is not None:
        parts = tuple(name for name in parts if name not in ("keys", "values"))
    return given | {name: given[name][b : b + 1] for name in parts if given.get(name) is not None}


@needs_extension
@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind, instructions, threads):
    """Neither on the other rows of the batch, nor on their nodes where these write nothing it sees, nor on threads."""
    with using(instructions):
        for sizes in ({"head": 32, "width": 64, "inner": 256}, {"hq": 6, "hkv": 2}):
            given = case(20, (0, 70, 131), starts=True, **ALL, **sizes, **KINDS[kind])
            frozen = case(20, (9, 70), write=40, kept=False, **ALL, **sizes, **KINDS[kind])
            threads(1)
            alone = [run(rows_of(given, b), backend="cpu") for b in range(3)]
            names = "x", "cos", "sin", "mask"
            nodes = [
                run(frozen | {name: frozen[name][:, n : n + 1] for name in names}, backend="cpu")[0] for n in range(20)
            ]
            for count in (1, 2, 3):
                threads(count)
                together = run(given, backend="cpu")
                for b, one in enumerate(alone):
                    for have, want in zip(together, one):
                        assert torch.equal(have[b].nan_to_num(9.0), want[0].nan_to_num(9.0)), (sizes, count, b)
                for n in (1, 2, 3, 5, 8, 9, 13, 20):
                    some = {name: frozen[name][:, 20 - n :] for name in names}
                    have = run(frozen | some, backend="cpu")[0]
                    assert torch.equal(have, torch.cat(nodes[20 - n :], 1)), (sizes, count, n)


PARENTS = [-1, 0, 0, 1, 1, 3, 5, 6]


def path(node: int) -> list[int]:
    return [*path(PARENTS[node]), node] if node >= 0 else []


def tree_call(length, window, **options):
    """A tree of 8 nodes behind a text of `length` tokens, whose layer sees a window if there is one."""
    given = case(8, (length,), slack=20, **options)
    bits = torch.zeros(1, 8, 8, dtype=torch.bool)
    for n in range(8):
        bits[0, n, path(n)[-window:] if window else path(n)] = True
    given = mapped(given, lambda x: x.nan_to_num(7.0)) | {"mask": packed(bits)}
    if window:
        places = torch.tensor([[length + len(path(n)) - 1 for n in range(8)]])
        given["starts"] = (places - window + 1).int()
    return given


def check_tree(given, length, leaf):
    """The nodes up to `leaf` in a tree and one at a time behind each other."""
    tree = run(given, backend="cpu")[0]
    one = given | {name: given[name].clone() for name in ("keys", "values")}
    for i, n in enumerate(path(leaf)):
        parts = {
            name: given[name][:, n : n + 1] for name in ("x", "cos", "sin", "starts") if given.get(name) is not None
        }
        token = one | parts | {"lengths": torch.tensor([length + i]).int(), "mask": torch.ones(1, 1, 1).long()}
        out = decoder_layer(**token, backend="cpu")
        assert torch.equal(out[0, 0], tree[0, n]), (length, leaf, n)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 2, 4, 30, 70])
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
def test_a_node_has_the_bits_of_the_token_decoded_alone(pages, window, kind):
    """At lengths around multiples of 64, 16 and 1; also where a window is shorter than the tree is deep."""
    for length in (0, 1, 5, 15, 16, 17, 50, 57, 58, 63, 64, 65, 100, 127, 128, 191, 250):
        given = tree_call(length, window, head=20 if length % 2 else 32, **(ALL if length % 3 else {}), **KINDS[kind])
        given = in_pages(given) if pages else given
        for leaf in (7, 4, 2):
            check_tree(given, length, leaf)


@needs_extension
@pytest.mark.parametrize("instructions", HERE)
def test_so_it_has_on_every_instruction_set(instructions, threads):
    with using(instructions):
        for count in (1, 2, 3):
            threads(count)
            for length in (5, 60, 63, 64, 121):
                check_tree(tree_call(length, 40, **ALL), length, 7)


def parts_of(given, layer):
    queries, head = len(layer.q.weight), given["keys"].shape[3]
    sizes = given["x"].dtype, given["x"].shape[2], queries // head, given["keys"].shape[1], head
    return Parts(sizes, *flat(layer), head**-0.5, given["softcap"], given["keys_of_output"])


def arguments_of(given, planes):
    names = "lengths", "mask", "block_table", "starts", "write"
    return given["x"], given["cos"], given["sin"], planes, *(given.get(name) for name in names)


@needs_extension
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "pages"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_layers_are_those_one_after_the_other(kind, pages, count, threads):
    threads(count)
    for of_output in (False, True):
        options = ALL | ({"norms": "draft", "of_output": True, "write": 6} if of_output else {})
        given = case(7, (5, 66, 130), starts=not of_output, **options, **KINDS[kind])
        given = in_pages(given) if pages else given
        layers = [
            weights(
                dtype=given["x"].dtype, seed=seed, linear=KINDS[kind].get("linear"), norms=options["norms"], biases=True
            )
            for seed in range(4)
        ]
        x, want, planes = given["x"], [], []
        for layer in layers:
            out, *written = run(given | {"x": x, "layer": layer}, backend="cpu")
            want += written
            planes += [given["keys"].clone(), given["values"].clone()]
            x = out
        together = Layers([parts_of(given, layer) for layer in layers])
        assert torch.equal(together(*arguments_of(given, planes)), x)
        assert all(torch.equal(have.nan_to_num(9.0), one.nan_to_num(9.0)) for have, one in zip(planes, want))


@needs_extension
def test_layers_hold_what_they_read():
    """Weights that the caller lets go, or that are given other memory; those written in place are read as they are."""
    given = case()
    layer = given["layer"]
    want = run(given, backend="cpu")[0]
    copy = LayerWeights(
        *(Linear(torch.nn.Parameter(one.weight.clone(), False)) for one in layer.linears),
        *(one and Norm(torch.nn.Parameter(one.weight.clone(), False), one.eps) for one in layer.norms),
    )
    layers = Layers([parts_of(given, copy)])
    up = copy.up.weight
    for one in copy.linears[:5]:
        one.weight.data = torch.full_like(one.weight, float("nan"))
    down = copy.down.weight
    del copy
    gc.collect()
    junk = [torch.full_like(up, float("nan")) for _ in range(20)]

    def now(layers=layers):
        return layers(*arguments_of(given, [given["keys"].clone(), given["values"].clone()]))

    assert torch.equal(now(), want) and junk
    up.mul_(2.0), down.mul_(0.5)
    assert torch.equal(now(), want)
    down.zero_()
    assert not torch.equal(now(), want)
    number = layers.number
    del layers, now
    gc.collect()
    with pytest.raises(RuntimeError, match=f"layers {number} are gone"):
        torch.ops.beagle.run_layers(number, *arguments_of(given, [given["keys"], given["values"]]), 0)


@needs_extension
def test_layers_that_cannot_run_together_are_refused():
    given, other = case(), case(inner=80)
    less = given["layer"]._replace(k=None, v=None)
    for layers in ([], [given["layer"], other["layer"]], [given["layer"], less]):
        with pytest.raises(ValueError, match=f"{len(layers)} layers of several sizes or dtypes; allowed: 1 or more"):
            Layers([parts_of(given, layer) for layer in layers])


@needs_extension
def test_run_layers_passes_opcheck():
    given = mapped(case(), lambda x: x.nan_to_num(0.0))
    layers = Layers([parts_of(given, given["layer"])])
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    arguments = arguments_of(given, [given["keys"], given["values"]])
    torch.library.opcheck(torch.ops.beagle.run_layers.default, (layers.number, *arguments, 0))


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_keys_alone_and_rings_of_them(kind):
    """Of states that are given, the keys that the layer which made them would write; in slots modulo a number."""
    given = case(5, (3, 9), **ALL | {"norms": "draft", "of_output": True}, **KINDS[kind])
    layer = given["layer"]
    alone = LayerWeights(None, layer.k, layer.v, None, None, None, None, norm_state=layer.norm_state)
    sizes = given["x"].dtype, 70, 4, 2, 20
    straight, own, ring = ([given[name].nan_to_num(0.0) for name in ("keys", "values")] for _ in range(3))
    states = Layers([parts_of(given, layer)])(*arguments_of(given, straight))
    keys = Layers([Parts(sizes, *flat(alone), 1.0, None, True)])
    given["x"] = states
    keys(*arguments_of(given, own))
    keys(*arguments_of(given, ring), ring=11)
    assert all(map(torch.equal, own, straight))
    for have, want in zip(ring, straight):
        assert torch.equal(have[0, :, 3:8], want[0, :, 3:8])
        assert torch.equal(have[1, :, 9:11], want[1, :, 9:11]) and torch.equal(have[1, :, :3], want[1, :, 11:14])


@needs_extension
def test_calls_from_several_threads_at_once(threads):
    """Of different sizes, so that memory kept from one call to the next would show."""
    calls = [case(n, (40 * n, 3), head=20 + n, seed=n, **ALL) for n in (1, 4, 9, 16)]
    wanted = [run(given, backend="cpu") for given in calls]

    def work(i):
        torch.set_num_threads(1 + i % 3)
        found = run(calls[i % 4], backend="cpu")
        return all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(found, wanted[i % 4]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(80)))


def bad_inputs():
    """A call, and changes of it or of its layer with what is said of each."""
    given = case(norms="qwen")
    layer, x, table = given["layer"], given["x"], torch.zeros(2, 4, dtype=torch.int32)

    def of(**changes):
        return {"layer": layer._replace(**changes)}

    pages = {"block_table": table}
    return given, [
        ({"x": x[0]}, ValueError, r"x has shape \[5, 70\]; allowed: \[any, any, any\]"),
        ({"x": x[:, :, :0]}, ValueError, "the width of x is 0; allowed: 1 to"),
        ({"x": x.long()}, TypeError, "x is int64; allowed: float32, float16, bfloat16, float64"),
        ({"keys": given["keys"].half()}, TypeError, "keys is float16; allowed: float32"),
        ({"keys": given["keys"][:1]}, ValueError, r"keys has shape \[1, .*; allowed: \[2, any, any, any\]"),
        ({"values": given["values"][:, :, :-1]}, ValueError, "values has shape"),
        (
            {"keys": given["keys"][:1].expand(2, -1, -1, -1)},
            ValueError,
            r"keys has stride \(0, .*; allowed: a place of",
        ),
        (
            {"keys": x.new_zeros(2, 2, 9, 0), "values": x.new_zeros(2, 2, 9, 0)},
            ValueError,
            "head size is 0; allowed: 1",
        ),
        (
            {"cos": given["cos"][:, :, :7], "sin": given["sin"][:, :, :7]},
            ValueError,
            "cos turns 7 numbers of a head; a",
        ),
        (
            {"cos": x[:, :, :22], "sin": x[:, :, :22]},
            ValueError,
            "turns 22 numbers of a head; allowed: an even number up",
        ),
        ({"sin": given["sin"][:, :, :8]}, ValueError, r"sin has shape \[2, 5, 8\]; allowed: \[2, 5, 20\]"),
        ({"cos": given["cos"].double()}, TypeError, "cos is float64"),
        ({"lengths": given["lengths"].long()}, TypeError, "lengths is int64; allowed: int32"),
        ({"mask": given["mask"].int()}, TypeError, "mask is int32; allowed: int64"),
        ({"mask": given["mask"][..., :0]}, ValueError, r"mask has shape \[2, 5, 0\]; allowed: at least one word"),
        ({"block_table": table[:1]}, ValueError, r"block_table has shape \[1, 4\]"),
        (pages | {name: given[name][:0] for name in ("keys", "values")}, ValueError, "keys holds 0 pages of 64 slots"),
        ({"starts": table}, ValueError, r"starts has shape \[2, 4\]; allowed: \[2, 5\]"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; allowed: 1e-30 to 1e30, or None"),
        ({"write": -1}, ValueError, "write is -1; allowed: 0 to"),
        ({"write": 1.0}, TypeError, "write is a float; allowed: an int"),
        ({"sin": given["sin"].to("meta")}, ValueError, "sin on meta"),
        ({"values": given["values"].to("meta")}, ValueError, "values on meta"),
        ({"layer": None}, TypeError, "layer is a NoneType; allowed: a LayerWeights"),
        (of(q=None), TypeError, "layer.q is a NoneType; allowed: a Linear"),
        (of(o=None), TypeError, "layer.o is a NoneType; allowed: a Linear"),
        (of(up=layer.up.weight), TypeError, "layer.up is a Tensor; allowed: a Linear"),
        (of(norm_in=layer.norm_in.weight), TypeError, "layer.norm_in is a Tensor; allowed: a Norm"),
        (of(k=None), ValueError, "layer.k is None; allowed: both of k and v, or none"),
        (of(v=None), ValueError, "layer.v is None"),
        (of(activation="relu"), ValueError, "layer.activation is 'relu'; allowed: silu, gelu_tanh"),
        (
            of(q=Linear(layer.q.weight[:30])),
            ValueError,
            "layer.q.weight has 30 rows; allowed: a multiple of the head s",
        ),
        (of(q=Linear(layer.q.weight[:60])), ValueError, "3 query heads and 2 key heads"),
        (of(q=Linear(layer.q.weight.half())), TypeError, "layer.q.weight is float16; allowed: float32, bfloat16"),
        (of(gate=Linear(layer.gate.weight[0])), ValueError, r"layer.gate.weight has shape \[70\]"),
        (of(down=Linear(layer.up.weight)), ValueError, r"layer.down.weight has shape \[90, 70\]; allowed: \[70, 90\]"),
        (of(k=Linear(layer.q.weight)), ValueError, r"layer.k.weight has shape \[80, 70\]; allowed: \[40, 70\]"),
        (of(o=Linear(layer.o.weight, x[0, 0, :3])), ValueError, r"layer.o.bias has shape \[3\]; allowed: \[70\]"),
        (of(o=Linear(layer.o.weight, x[0, 0].bfloat16())), TypeError, "layer.o.bias is bfloat16; allowed: float32"),
        (of(norm_q=layer.norm_in), ValueError, r"layer.norm_q.weight has shape \[70\]; allowed: \[20\]"),
        (of(norm_in=Norm(x[0, 0].half(), 1e-5)), TypeError, "layer.norm_in.weight is float16; allowed: float32"),
        (of(norm_in=Norm(x[0, 0].to("meta"), 1e-5)), ValueError, "layer.norm_in.weight on meta"),
        (of(up=Linear(layer.up.weight.to("meta"))), ValueError, "layer.up.weight on meta"),
    ]


def test_bad_inputs():
    given, cases = bad_inputs()
    for changes, error, message in cases:
        with pytest.raises(error, match="decoder_layer: .*" + message):
            decoder_layer(**given | changes)
    half = mapped(given, torch.Tensor.half)
    with pytest.raises(TypeError, match="layer.q.weight is bfloat16; allowed: float16"):
        decoder_layer(**half | {"layer": half["layer"]._replace(q=Linear(half["layer"].q.weight.bfloat16()))})
