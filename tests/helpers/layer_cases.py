"""Random decoder layers over random caches, and the same layer as plain PyTorch modules compute it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle_kernels import LayerWeights, Linear, Norm, decoder_layer
from beagle_kernels.reference.tree_attention import gather_pages, visible_slots

NORMS = {
    "llama": ("norm_in", "norm_mlp"),
    "qwen": ("norm_in", "norm_q", "norm_k", "norm_mlp"),
    "gemma": ("norm_in", "norm_q", "norm_k", "norm_attended", "norm_mlp", "norm_after"),
    "draft": ("norm_in", "norm_mlp", "norm_out", "norm_state"),
    "none": (),
}
"""Which norms families have; Gemma's add 1 to their weight."""
PAGE = 16


def weights(
    width=70,
    hq=4,
    hkv=2,
    head=20,
    inner=90,
    dtype=torch.float32,
    linear=None,
    biases=False,
    norms="llama",
    kept=True,
    activation="silu",
    residual=1.0,
    seed=0,
) -> LayerWeights:
    """A layer of such sizes; `linear` is the dtype of its matrices, if it is another; without `kept` no k and v."""
    pick = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=pick, dtype=torch.float64)

    def make(outputs: int, inputs: int) -> Linear:
        weight = (normal(outputs, inputs) * max(inputs, 1) ** -0.5).to(linear or dtype)
        return Linear(weight, normal(outputs).mul(0.3).to(dtype) if biases else None)

    q, k, v, o = make(hq * head, width), make(hkv * head, width), make(hkv * head, width), make(width, hq * head)
    mlp = make(inner, width), make(inner, width), make(width, inner)
    added = 1.0 if norms == "gemma" else 0.0
    named = {}
    for name in NORMS[norms]:
        size = head if name in ("norm_q", "norm_k") else width
        named[name] = Norm((1 - added + 0.2 * normal(size)).to(dtype), 1e-5, added)
    k, v = (k, v) if kept else (None, None)
    return LayerWeights(q, k, v, o, *mlp, **named, activation=activation, residual=residual)


def case(
    nodes=5,
    lengths=(3, 40),
    hkv=2,
    head=20,
    width=70,
    rotary=None,
    dtype=torch.float32,
    write=0,
    of_output=False,
    starts=False,
    softcap=None,
    slack=4,
    kept=True,
    words=0,
    seed=0,
    **sizes,
) -> dict[str, Any]:
    """The op's arguments by name: nodes of random trees behind `lengths`, each of which also sees some of the `write`
    keys before it. What no node sees holds NaN."""
    layer = weights(width, hkv=hkv, head=head, dtype=dtype, kept=kept, seed=seed, **sizes)
    pick, batch = torch.Generator().manual_seed(seed + 1), len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=pick, dtype=torch.float64).to(dtype)

    bits = torch.zeros(batch, nodes, write + nodes, dtype=torch.bool)
    bits[..., :write] = torch.rand(batch, nodes, write, generator=pick) < 0.5
    if kept and not of_output:
        for n in range(nodes):
            parents = torch.randint(max(n, 1), (batch,), generator=pick)
            bits[:, n, write:] |= bits[torch.arange(batch), parents, write:]
            bits[:, n, write + n] = True
    slots = max([0, *lengths]) + write + nodes + slack
    slots += -slots % PAGE
    length = torch.tensor(lengths, dtype=torch.int32)
    angles = torch.rand(batch, nodes, head if rotary is None else rotary, generator=pick) * 6
    call = {
        "x": normal(batch, nodes, width),
        "layer": layer,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": normal(batch, hkv, slots, head),
        "values": normal(batch, hkv, slots, head),
        "lengths": length,
        "mask": F.pad(packed(bits), (0, words)),
        "softcap": softcap,
        "write": write,
        "keys_of_output": of_output,
    }
    if starts:
        call["starts"] = (length[:, None] - 30 + 3 * torch.arange(nodes)).int()
    unseen = ~visible_slots(slots, length, call["mask"], call.get("starts")).any(1)[:, None, :, None]
    for name in ("keys", "values"):
        call[name] = call[name].masked_fill(unseen, float("nan"))
    return call


def packed(bits: Tensor) -> Tensor:
    """Bool [.., n] as int64 words of 64."""
    whole = F.pad(bits, (0, -bits.shape[-1] % 64 if bits.shape[-1] else 64)).unflatten(-1, (-1, 64)).long()
    return (whole << torch.arange(64)).sum(-1)


def run(call: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, and the keys and values that it leaves, from copies of those given, strides and all."""
    given = call | changes
    keys, values = (_copy(given[name]) for name in ("keys", "values"))
    return decoder_layer(**given | {"keys": keys, "values": values}), keys, values


def _copy(plane: Tensor) -> Tensor:
    return torch.empty_strided(plane.shape, plane.stride(), dtype=plane.dtype).copy_(plane)


def mapped(call: dict[str, Any], function) -> dict[str, Any]:
    """The same call with every floating tensor, also of the layer, replaced by function(tensor)."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value) if value.is_floating_point() else value
        if isinstance(value, LayerWeights | Linear | Norm):
            return type(value)(*map(of, value))
        return value

    return {name: of(value) for name, value in call.items()}


def in_pages(call: dict[str, Any]) -> dict[str, Any]:
    """The same cache in shuffled pages among those of others; where a row has nothing to read or write its table names
    no page, or another row's."""
    count = call["keys"].shape[2] // PAGE
    batch, nodes = call["x"].shape[:2]
    order = torch.randperm(batch * count + 2, generator=torch.Generator().manual_seed(1))[: batch * count]
    seen = visible_slots(count * PAGE, call["lengths"], call["mask"], call.get("starts")).any(1)
    slot = torch.arange(count * PAGE) - call["lengths"][:, None] - call["write"]
    used = (seen | ((slot >= 0) & (slot < nodes))).unflatten(1, (count, PAGE)).any(2)
    wild = torch.tensor([-7, 2**31 - 1, int(order[0]) if len(order) else 0])[torch.arange(count) % 3]
    table = torch.where(used, order.view(batch, count), wild).int()
    planes = {}
    for name in ("keys", "values"):
        cut = call[name].unflatten(2, (count, PAGE)).transpose(1, 2).flatten(0, 1)
        planes[name] = torch.full((len(cut) + 2, *cut.shape[1:]), float("nan"), dtype=cut.dtype)
        planes[name][order] = cut
    return call | planes | {"block_table": table}


def eager(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Out, and the dense cache as it is left, by plain modules that round to x's dtype one after the other."""
    layer, x, (keys, values) = call["layer"], call["x"], (call[name].clone() for name in ("keys", "values"))
    heads, act = (-1, keys.shape[3]), {"silu": F.silu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}

    def keep(h: Tensor) -> None:
        if layer.k is None:
            return
        new = _turned(_norm(_linear(h, layer.k).unflatten(-1, heads), layer.norm_k), call), _linear(h, layer.v)
        for plane, states in zip((keys, values), (new[0], new[1].unflatten(-1, heads))):
            for b, length in enumerate(call["lengths"].tolist()):
                first = max(length, 0) + call["write"]
                room = max(min(plane.shape[2] - first, x.shape[1]), 0)
                plane[b, :, first : first + room] = states[b, :room].transpose(0, 1)

    h = _norm(x, layer.norm_in)
    if not call["keys_of_output"]:
        keep(h)
    q = _turned(_norm(_linear(h, layer.q).unflatten(-1, heads), layer.norm_q), call)
    attended = _linear(_attention(q, keys, values, call).flatten(2), layer.o)
    y = x + _norm(attended, layer.norm_attended) * layer.residual
    z = _norm(y, layer.norm_mlp)
    mlp = _linear(act[layer.activation](_linear(z, layer.gate)) * _linear(z, layer.up), layer.down)
    out = _norm(y + _norm(mlp, layer.norm_after) * layer.residual, layer.norm_out)
    if call["keys_of_output"]:
        keep(_norm(out, layer.norm_state))
    return out, keys, values


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias)


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    wide = x.float() if x.dtype != torch.float64 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.added:
        return (normed * (norm.added + norm.weight.to(wide.dtype))).to(x.dtype)
    return normed.to(x.dtype) * norm.weight


def _turned(x: Tensor, call: dict[str, Any]) -> Tensor:
    cos, sin = call["cos"][:, :, None], call["sin"][:, :, None]
    size = cos.shape[-1]
    part = x[..., :size]
    rotated = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
    return torch.cat((part * cos + rotated * sin, x[..., size:]), -1)


def _attention(q: Tensor, keys: Tensor, values: Tensor, call: dict[str, Any]) -> Tensor:
    if (table := call.get("block_table")) is not None:
        keys, values = gather_pages(keys, table), gather_pages(values, table)
    visible = visible_slots(keys.shape[2], call["lengths"], call["mask"], call.get("starts"))
    unseen, group = ~visible.any(1)[:, None, :, None], q.shape[2] // keys.shape[1]
    keys, values = (plane.masked_fill(unseen, 0.0).repeat_interleave(group, 1) for plane in (keys, values))
    scores = torch.einsum("bnhd,bhsd->bhns", q, keys) * call.get("scale", q.shape[-1] ** -0.5)
    if (cap := call["softcap"]) is not None:
        scores = cap * torch.tanh(scores / cap)
    shares = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).to(q.dtype)
    return torch.einsum("bhns,bhsd->bnhd", shares.masked_fill(~visible.any(2)[:, None, :, None], 0.0), values)
