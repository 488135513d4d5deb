"""`decoder_layer` by the compiled executor of the host; `Layers` is one or more of them, read once and called often."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..backends import implementation, operator
from ..extension import _C, DTYPES, address, contiguous, dense, kind_of, missing_cpu

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_NO_LINEAR = (0, 0, 0, 0, 0, 0, 0, 0)


class Parts:
    """A layer as the executor reads it: x's dtype, d, Hq, Hkv and D, the op's arguments for what it is made of, and how
    it attends; turned: queries and keys have rotary positions. Holds its weights; `sizes` is alike for layers that can
    run together."""

    def __init__(
        self,
        sizes: tuple[torch.dtype, int, int, int, int],
        weights: Sequence[Tensor | None],
        numbers: Sequence[float],
        activation: str,
        residual: float,
        scale: float,
        softcap: float | None,
        keys_of_output: bool = False,
        turned: bool = True,
    ):
        dtype, width, heads, key_heads, head = sizes
        # a view of its own keeps the memory that the executor reads, whatever the caller's tensor is given later
        held = [None if one is None else one.detach() for one in weights]
        self.weights = [None if one is None else dense(one) for one in held[:7]]
        self.weights += map(contiguous, held[7:])
        self.sizes = [sizes, *(None if one is None else (one.shape, one.dtype) for one in self.weights)]
        linears: list[int] = []
        for weight, bias, scales in zip(self.weights[:7], self.weights[7:14], self.weights[22:]):
            linears += _NO_LINEAR if weight is None else _linear(weight, bias, scales, dtype)
        norms: list[float] = []
        for weight, eps, added in zip(self.weights[14:22], numbers[:8], numbers[8:]):
            norms += address(weight), eps, added
        self.values = DTYPES[dtype], width, heads, key_heads, head, *linears, *norms
        self.values += _ACTIVATIONS[activation], residual, scale, softcap or 0.0, keys_of_output, turned


class Layers:
    """Layers of equal sizes one after the other, whose weights stay as and where they are.

    Raises ValueError for layers that cannot run together."""

    def __init__(self, parts: Sequence[Parts]):
        if not parts or any(one.sizes != parts[0].sizes for one in parts):
            raise ValueError(f"Layers: {len(parts)} layers of several sizes or dtypes; allowed: 1 or more, all alike")
        self.parts = parts
        self.executor = _C.cpu.DecoderLayers([one.values for one in parts])
        self.number = next(_numbers)
        _made[self.number] = self

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        planes: Sequence[Tensor],
        lengths: Tensor,
        mask: Tensor,
        block_table: Tensor | None,
        starts: Tensor | None,
        write: int = 0,
        ring: int = 0,
        ends: Tensor | None = None,
    ) -> Tensor:
        """As decoder_layer, layer by layer; planes: the keys and values of each, whose last dimension is contiguous;
        ring: keys go into slots modulo so many, if it is not 0; ends [B] int32: none go into slots from there on."""
        run = torch.ops.beagle.run_layers.default
        return run(self.number, x, cos, sin, planes, lengths, mask, block_table, starts, write, ring, ends)


_made: WeakValueDictionary[int, Layers] = WeakValueDictionary()
_numbers = itertools.count()


@operator("run_layers", mutates_args=("planes",))
def _run(
    layers: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    planes: Sequence[Tensor],
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    starts: Tensor | None,
    write: int,
    ring: int,
    ends: Tensor | None = None,
) -> Tensor:
    if layers not in _made:
        raise RuntimeError(f"run_layers: layers {layers} are gone; allowed: those of a Layers that is still held")
    x, cos, sin, lengths, mask = (one.contiguous() for one in (x, cos, sin, lengths, mask))
    block_table, starts, ends = contiguous(block_table), contiguous(starts), contiguous(ends)
    out = torch.empty_like(x)
    first = planes[0]
    _made[layers].executor.run(
        torch.get_num_threads(),
        [(one.data_ptr(), *one.stride()[:3]) for one in planes],
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        cos.shape[2],
        cos.data_ptr(),
        sin.data_ptr(),
        first.shape[2],
        address(block_table),
        0 if block_table is None else block_table.shape[1],
        first.shape[0],
        lengths.data_ptr(),
        mask.data_ptr(),
        mask.shape[2],
        address(starts),
        write,
        ring,
        address(ends),
    )
    return out


@_run.register_fake
def _(layers, x, *args):
    return x.new_empty(x.shape)


@implementation("decoder_layer", "cpu", missing_cpu, float64=False)
def decoder_layer(
    x: Tensor,
    weights: Sequence[Tensor | None],
    numbers: Sequence[float],
    activation: str,
    residual: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    starts: Tensor | None,
    scale: float,
    softcap: float | None,
    write: int,
    keys_of_output: bool,
) -> Tensor:
    heads = weights[0].shape[0] // keys.shape[3]  # type: ignore[union-attr]
    sizes = x.dtype, x.shape[2], heads, keys.shape[1], keys.shape[3]
    layer = Layers([Parts(sizes, weights, numbers, activation, residual, scale, softcap, keys_of_output)])
    planes = [dense(plane) for plane in (keys, values)]
    out = layer(x, cos, sin, planes, lengths, mask, block_table, starts, write)
    for given, plane in zip((keys, values), planes):
        if plane is not given:
            given.copy_(plane)
    return out


def _linear(weight: Tensor, bias: Tensor | None, scales: Tensor | None, dtype: torch.dtype) -> tuple[int, ...]:
    outputs, width = weight.shape
    group = 0 if scales is None else width // max(scales.shape[1], 1)
    return (
        weight.data_ptr(),
        address(bias),
        address(scales),
        kind_of(weight, dtype),
        outputs,
        width,
        weight.stride(0),
        group,
    )
