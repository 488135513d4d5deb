"""decoder_layer against transformers' own layer, with its attention and with ours, at SmolLM2's and a 1B's sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from beagle_kernels import LayerWeights, Linear, Norm, decoder_layer, skinny_linear, tree_attention
from beagle_kernels.compiled.decoder_layer import Layers, Parts
from beagle_kernels.decoder_layer import flat
from beagle_kernels.extension import missing_cpu
from bench.registry import Case, drive, label, parameters

FP32, BF16 = torch.float32, torch.bfloat16


class Size(NamedTuple):
    """A model's layer."""

    name: str
    width: int
    heads: int
    key_heads: int
    head: int
    inner: int


TINY = Size("tiny", 48, 4, 2, 16, 64)
SMOLLM2 = Size("SmolLM2", 576, 9, 3, 64, 1536)
ONE_B = Size("1B", 2048, 32, 8, 64, 8192)
KINDS = ((FP32, FP32), (BF16, BF16), (FP32, BF16))
"""x's dtype, and that of the linear layers' weights."""
SHAPES: dict[str, list[tuple[Size, tuple, tuple[int, ...], tuple[int, ...]]]] = {
    # size -> (layer, kinds, nodes, cached keys)
    "tiny": [(TINY, KINDS, (3,), (20,))],
    "small": [(size, KINDS, (1, 8), (300, 2000)) for size in (SMOLLM2, ONE_B)],
    "scaling": [(SMOLLM2, KINDS[:1], (1, 2, 4, 8, 16), (300,))],
}
CACHED = 200 * 10**6
"""Bytes of layers' weights that go round, so that none is found in a cache."""


class Model(NamedTuple):
    """Layers, and a key and a value plane for each."""

    layers: list[LayerWeights]
    planes: list[Tensor]


class Round(NamedTuple):
    """What new tokens bring: the op's arguments of the same names."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    lengths: Tensor
    mask: Tensor


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if device == "cuda" or missing_cpu(torch.device(device)):  # the reference serves there: nothing of ours to measure
        return
    for shape, kinds, counts, prefixes in SHAPES[size]:
        for dtype, kind in kinds:
            each = (
                sum(one.weight.numel() for one in layer_of(shape, dtype, kind, "meta").linears if one) * kind.itemsize
            )
            count = 2 if size == "tiny" else CACHED // each + 1
            layers = [layer_of(shape, dtype, kind) for _ in range(count)]
            for keys in prefixes:
                room = 2 * count, 1, shape.key_heads, keys + max(counts), shape.head
                model = Model(layers, list(torch.randn(room).to(dtype)))
                for nodes in counts:
                    yield case(shape, kind, model, round_of(shape, dtype, nodes, keys))


def layer_of(size: Size, dtype: torch.dtype, kind: torch.dtype, device: str = "cpu") -> LayerWeights:
    _, width, heads, key_heads, head, inner = size

    def linear(outputs: int, inputs: int) -> Linear:
        return Linear((torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(kind))

    def norm() -> Norm:
        return Norm((torch.randn(width, device=device) / 8 + 1).to(dtype), 1e-5)

    q, k, v = (linear(count * head, width) for count in (heads, key_heads, key_heads))
    o, gate, up, down = linear(width, heads * head), linear(inner, width), linear(inner, width), linear(width, inner)
    return LayerWeights(q, k, v, o, gate, up, down, norm_in=norm(), norm_mlp=norm())


def round_of(size: Size, dtype: torch.dtype, nodes: int, keys: int) -> Round:
    """A chain of nodes behind so many keys."""
    angles = torch.rand(1, nodes, size.head // 2).repeat(1, 1, 2) * 6
    mask = ((2 << torch.arange(nodes)) - 1)[None, :, None]
    x = torch.randn(1, nodes, size.width).to(dtype)
    return Round(x, angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([keys], dtype=torch.int32), mask)


def case(size: Size, kind: torch.dtype, model: Model, given: Round) -> Case:
    """All layers, one after the other, are a call; `work` counts the bytes of their weights and of the keys seen."""
    dtype, nodes, keys = given.x.dtype, given.x.shape[1], int(given.lengths)
    together = executor(size, model, dtype)
    weights = [one.weight for layer in model.layers for one in layer.linears if one]

    def layer_by_layer() -> Tensor:
        x = given.x
        for layer, planes in zip(model.layers, pairs(model.planes)):
            x = decoder_layer(x, layer, given.cos, given.sin, *planes, given.lengths, given.mask)
        return x

    def in_one_call() -> Tensor:
        return together(given.x, given.cos, given.sin, model.planes, given.lengths, given.mask, None, None)

    peers: dict[str, Callable | str] = {"beagle": in_one_call, "beagle a call a layer": layer_by_layer}
    for name, ours in (("transformers", False), ("transformers, our attention", True)):
        peers[name] = transformers_layers(size, model, given, ours) if kind == dtype else "one dtype for x and weights"
    peers["the linear layers alone"] = linears_alone(model, given)
    peers["read"] = lambda: [weight.view(torch.int32).amax() for weight in weights]
    wide, narrow = (defined(model, given, kind) for kind in (torch.float64, dtype))
    allowed = 4 * max((narrow.double() - wide).norm(), torch.finfo(dtype).eps * len(model.layers) * wide.norm())

    def check_peer(name: str) -> None:
        peer = peers[name]
        if name.startswith(("beagle", "transformers")) and callable(peer):
            error = (peer().double() - wide).norm()
            assert error <= allowed, f"{name} is wrong: off by {error:.3g}, allowed {allowed:.3g}"

    parameters_read = sum(weight.numel() for weight in weights)
    seen = 2 * len(model.layers) * size.key_heads * size.head * (keys + nodes) * dtype.itemsize
    name = {(FP32, BF16): "float32, weights in bfloat16"}.get((dtype, kind), str(dtype)[6:])
    return Case(
        f"decoder_layer {size.name}, {nodes} nodes, {keys} keys, {name}, {len(model.layers)} layers",
        peers,
        lambda: check_peer("beagle"),
        bounds=("the linear layers alone", "read"),
        rounds=9,
        check_peer=check_peer,
        series="decoder_layer",
        at={"model": size.name, "rows": nodes, "keys": keys, "dtype": name},
        work={"byte": float(sum(weight.nbytes for weight in weights) + seen), "flop": 2.0 * nodes * parameters_read},
    )


def executor(size: Size, model: Model, dtype: torch.dtype) -> Layers:
    sizes = dtype, size.width, size.heads, size.key_heads, size.head
    return Layers([Parts(sizes, *flat(layer), size.head**-0.5, None, False) for layer in model.layers])


def pairs(planes: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each layer's keys and values."""
    return zip(planes[::2], planes[1::2])


def defined(model: Model, given: Round, dtype: torch.dtype) -> Tensor:
    """What the definition gives, layer by layer, all in a dtype."""
    x, cos, sin = (part.to(dtype) for part in given[:3])

    def to(part: Any) -> Any:
        return part and part._replace(weight=part.weight.to(dtype))

    for layer, planes in zip(model.layers, pairs(model.planes)):
        kept = [plane.to(dtype, copy=True) for plane in planes]
        whole = LayerWeights(*map(to, layer[:15]))
        more: dict[str, Any] = {"backend": "reference"}
        x = decoder_layer(x, whole, cos, sin, kept[0], kept[1], given.lengths, given.mask, **more)
    return x


def linears_alone(model: Model, given: Round) -> Callable[[], None]:
    """Every layer's products by skinny_linear: those of one input follow each other, as in a layer."""
    weights = [one.weight for layer in model.layers for one in layer.linears if one]
    rows = {width: given.x.new_ones(given.x.shape[1], width) for width in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for weight in weights:
            skinny_linear(rows[weight.shape[1]], weight)

    return run


class Planes:
    """A layer's keys and values where they lie, in the place of transformers' cache."""

    def __init__(self, planes: tuple[Tensor, Tensor], length: int, whole: bool):
        self.planes, self.length, self.whole = planes, length, whole

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self.length + keys.shape[2]
        for plane, new in zip(self.planes, (keys, values)):
            plane[:, :, self.length : stop] = new
        return self.planes if self.whole else (self.planes[0][:, :, :stop], self.planes[1][:, :, :stop])


def tree_of_words(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, lengths: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """tree_attention as an attention function of transformers'."""
    return tree_attention(q.transpose(1, 2), k, v, lengths, mask), None


def transformers_layers(size: Size, model: Model, given: Round, ours: bool) -> Callable[[], Tensor] | str:
    """transformers' LlamaDecoderLayers over the same weights and planes; by SDPA, or by tree_attention."""
    try:
        from transformers import AttentionInterface, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    except ImportError as error:
        return f"transformers is not here: {error}"

    AttentionInterface.register("bench_tree", tree_of_words)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "bench_tree" if ours else "sdpa"
    nodes, keys = given.x.shape[1], int(given.lengths)
    mask: Tensor | None = given.mask
    if not ours:  # as transformers calls it: none for a token alone
        mask = torch.ones(nodes, keys + nodes, dtype=torch.bool).tril(keys)[None, None] if nodes > 1 else None
    stack = []
    for index, (layer, planes) in enumerate(zip(model.layers, pairs(model.planes))):
        with torch.device("meta"):
            module = LlamaDecoderLayer(config, index)
        own: list[Any] = [getattr(module.self_attn, f"{name}_proj") for name in "qkvo"]
        own += [getattr(module.mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        own += [module.input_layernorm, module.post_attention_layernorm]
        theirs: list[Any] = [*layer.linears, layer.norm_in, layer.norm_mlp]
        for part, weight in zip(own, theirs):
            part.weight = nn.Parameter(weight.weight, requires_grad=False)
        stack.append((module.eval(), Planes(planes, keys, ours)))
    # the cache's name changed in 5.24
    named = inspect.signature(inspect.unwrap(LlamaDecoderLayer.forward)).parameters
    cache_argument = "cache" if "cache" in named else "past_key_values"

    def run() -> Tensor:
        x = given.x
        with torch.no_grad():
            for module, cache in stack:
                more = {cache_argument: cache, "position_embeddings": (given.cos, given.sin)}
                x = module(x, attention_mask=mask, lengths=given.lengths, **more)
        return x

    return run


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_decoder_layer(benchmark, case, peer):
    drive(benchmark, case, peer)
