"""A decoder layer over a cache in one call: norms, projections, rotary positions, keys written, attention of a tree's
nodes, output, gated MLP.

    h   = norm_in(x)                       q, k, v = W_q h, W_k h, W_v h (+ biases)
    q   = RoPE(norm_q(q)), k = RoPE(norm_k(k)); k and v go into slots lengths[b] + write, .. + 1, .. of row b
    y   = x + residual norm_attended(W_o tree_attention(q, keys, values, lengths, mask))
    out = norm_out(y + residual norm_after(W_down (activation(W_gate z) * W_up z))), z = norm_mlp(y)

A norm that is None leaves its input as it is. With `keys_of_output`, as in the draft's block, k and v are those of
norm_state(out) instead, written when the attention is over. In fp32 or better inside, rounded to x's dtype where keys,
values and out are written.

On the CPU a row's result is bit for bit the same whatever rows come with it, and depends on the keys that it sees in
their order, not on where they lie: a token verified in a tree has the bits of the token decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks
from .int8_linear import check_groups
from .types import LayerWeights, Linear, Norm

ACTIVATIONS = ("silu", "gelu_tanh")


def decoder_layer(
    x: Tensor,
    layer: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    softcap: float | None = None,
    write: int = 0,
    keys_of_output: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One layer on N new tokens a row (docs/design.md: A round of decoding): out [B, N, d] of x [B, N, d].

    layer: LayerWeights, all in x's dtype, fp32, fp16, bf16 or fp64, weights of linear layers also in bf16 where x is
    fp32, and in int8 with scales as in int8_linear; W_q [Hq D, d], W_k and W_v [Hkv D, d], W_o [d, Hq D], W_gate and
    W_up [I, d], W_down [d, I]; norm_q and norm_k [D], the others [d]. cos, sin [B, N, R], R even and at most D: RoPE
    turns the first R numbers of a head, in halves. keys, values: the cache, [B, Hkv, S, D] or with block_table pages
    [P, Hkv, page, D], both written in place; lengths, mask, starts, softcap, scale and block_table as in
    tree_attention. Keys past the cache, or in a page that is none, are not written. write: at least 0. Not
    differentiable; fp64 is the reference's.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "decoder_layer"
    checks.tensor(op, "x", x, (None, None, None), checks.FLOATS)
    batch, nodes, width = x.shape
    checks.at_least(op, "the width of x", width, 1)
    dtype = (x.dtype,)
    checks.tensor(op, "keys", keys, (None if block_table is not None else batch, None, None, None), dtype)
    checks.tensor(op, "values", values, keys.shape, dtype)
    for name, plane in (("keys", keys), ("values", values)):
        if any(step == 0 and size > 1 for step, size in zip(plane.stride(), plane.shape)):
            raise ValueError(f"{op}: {name} has stride {plane.stride()}; allowed: a place of its own for each number")
    head = keys.shape[3]
    _check_weights(op, layer, width, head, keys.shape[1], x)
    checks.tensor(op, "cos", cos, (batch, nodes, None), dtype)
    checks.tensor(op, "sin", sin, cos.shape, dtype)
    if cos.shape[2] % 2 or cos.shape[2] > head:
        raise ValueError(f"{op}: cos turns {cos.shape[2]} numbers of a head; allowed: an even number up to {head}")
    checks.tensor(op, "lengths", lengths, (batch,), checks.INT32)
    checks.tensor(op, "mask", mask, (batch, nodes, None), checks.INT64)
    if mask.shape[2] < 1:
        raise ValueError(f"{op}: mask has shape {list(mask.shape)}; allowed: at least one word a node")
    if block_table is not None:
        checks.tensor(op, "block_table", block_table, (batch, None), checks.INT32)
        if keys.shape[0] < 1 or keys.shape[2] < 1:
            raise ValueError(f"{op}: keys holds {keys.shape[0]} pages of {keys.shape[2]} slots; allowed: 1 or more")
    if starts is not None:
        checks.tensor(op, "starts", starts, (batch, nodes), checks.INT32)
    given = {"x": x, "cos": cos, "sin": sin, "keys": keys, "values": values, "lengths": lengths, "mask": mask}
    checks.same_device(op, **given, starts=starts, block_table=block_table)
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"{op}: softcap is {softcap}; allowed: 1e-30 to 1e30, or None for no cap")
    checks.at_least(op, "write", write, 0)
    scale = head**-0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    more = block_table, starts, scale, softcap, write, keys_of_output
    return torch.ops.beagle.decoder_layer(x, *flat(layer), cos, sin, keys, values, lengths, mask, *more, backend)


def flat(layer: LayerWeights) -> tuple[list[Tensor | None], list[float], str, float]:
    """The op's own arguments for a layer: weights, biases, norms' weights and scales; each norm's eps and what it adds;
    its activation and the residual factor. ValueError for linear layers that cannot read the same rows."""
    _check_together(layer.linears)
    linears = [one or Linear(None, None) for one in layer.linears]  # type: ignore[arg-type]
    norms = [one or Norm(None, 0.0) for one in layer.norms]  # type: ignore[arg-type]
    tensors = [one.weight for one in linears] + [one.bias for one in linears] + [one.weight for one in norms]
    tensors += [one.scales for one in linears]
    numbers = [float(one.eps) for one in norms] + [float(one.added) for one in norms]
    return tensors, numbers, layer.activation, float(layer.residual)


def _check_weights(op: str, layer: LayerWeights, width: int, head: int, kv_heads: int, x: Tensor) -> None:
    if not isinstance(layer, LayerWeights):
        raise TypeError(f"{op}: layer is a {type(layer).__name__}; allowed: a LayerWeights")
    for name, part in zip(layer._fields, (*layer.linears, *layer.norms)):
        kind = Norm if name.startswith("norm") else Linear
        if not isinstance(part, kind) and not (part is None and (kind is Norm or name in "kv")):
            raise TypeError(f"{op}: layer.{name} is a {type(part).__name__}; allowed: a {kind.__name__}")
    if (layer.k is None) != (layer.v is None):
        raise ValueError(f"{op}: layer.{'k' if layer.k is None else 'v'} is None; allowed: both of k and v, or none")
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"{op}: layer.activation is {layer.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    kinds = (x.dtype, torch.bfloat16, torch.int8) if x.dtype == torch.float32 else (x.dtype, torch.int8)
    checks.tensor(op, "layer.q.weight", layer.q.weight, (None, width), kinds)
    checks.tensor(op, "layer.gate.weight", layer.gate.weight, (None, width), kinds)
    checks.at_least(op, "head size", head, 1)
    queries, inner = layer.q.weight.shape[0], layer.gate.weight.shape[0]
    if queries % head:
        raise ValueError(f"{op}: layer.q.weight has {queries} rows; allowed: a multiple of the head size, {head}")
    checks.heads(op, queries // head, kv_heads, head)
    keys = kv_heads * head
    attention = (queries, width), (keys, width), (keys, width), (width, queries)
    mlp = (inner, width), (inner, width), (width, inner)
    for name, linear, shape in zip(layer._fields, layer.linears, (*attention, *mlp)):
        if linear is not None:
            checks.tensor(op, f"layer.{name}.weight", linear.weight, shape, kinds)
            _check_scales(op, name, linear)
            if linear.bias is not None:
                checks.tensor(op, f"layer.{name}.bias", linear.bias, shape[:1], (x.dtype,))
            checks.same_device(op, x=x, **{f"layer.{name}.weight": linear.weight, f"layer.{name}.bias": linear.bias})
    for name, norm in zip(layer._fields[7:], layer.norms):
        if norm is not None:
            size = head if name in ("norm_q", "norm_k") else width
            checks.tensor(op, f"layer.{name}.weight", norm.weight, (size,), (x.dtype,))
            checks.same_device(op, x=x, **{f"layer.{name}.weight": norm.weight})


def _check_together(linears: Sequence[Linear | None]) -> None:
    """Check that what multiplies the same rows reads them alike: q, k and v, gate and up, all in int8 with as many
    groups, or none of them."""
    for names, some in (("q, k and v", linears[:3]), ("gate and up", linears[4:6])):
        groups = [0 if one.scales is None else one.scales.shape[1] for one in some if one is not None]
        if len(set(groups)) > 1:
            raise ValueError(
                f"decoder_layer: {names} have {groups} scales a row; allowed: all in int8 with as many, or all without"
            )


def _check_scales(op: str, name: str, linear: Linear) -> None:
    if (linear.scales is None) == (linear.weight.dtype == torch.int8):
        has = "no scales" if linear.scales is None else "scales"
        raise ValueError(
            f"{op}: layer.{name} is in {linear.weight.dtype} and has {has}; allowed: scales with a weight in int8, and "
            "with no other"
        )
    if linear.scales is not None:
        checks.tensor(op, f"layer.{name}.scales", linear.scales, (linear.weight.shape[0], None), checks.FLOAT32)
        check_groups(op, linear.weight.shape[1], linear.scales.shape[1])


@backends.operator("decoder_layer", mutates_args=("keys", "values"))
def _op(
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
    backend: str = "auto",
) -> Tensor:
    given = cos, sin, keys, values, lengths, mask, block_table, starts, scale, softcap, write, keys_of_output
    return backends.call("decoder_layer", backend, x.device, x, weights, numbers, activation, residual, *given)


@_op.register_fake
def _(x, *args, **kwargs):
    return x.new_empty(x.shape)
