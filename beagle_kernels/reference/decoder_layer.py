"""The definition of `decoder_layer`: its parts one after the other, in fp32 or better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import implementation
from ..types import accumulation
from .int8_linear import int8_linear
from .tree_attention import tree_attention

_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@implementation("decoder_layer", "reference")
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
    acc, head = accumulation(x.dtype), keys.shape[3]
    wide = [one if one is None or one.dtype == torch.int8 else one.to(acc) for one in weights[:22]]
    linears = zip(wide[:7], wide[7:14], weights[22:])
    norms = zip(wide[14:], numbers[:8], numbers[8:])
    q, k, v, o, gate, up, down = (_Linear(*one) for one in linears)
    norm_in, norm_q, norm_k, norm_attended, norm_mlp, norm_after, norm_out, norm_state = (_Norm(*one) for one in norms)
    angles = cos.to(acc)[:, :, None], sin.to(acc)[:, :, None]

    def keep(h: Tensor) -> None:
        if k.weight is not None:
            new = _turned(norm_k(k(h).unflatten(-1, (-1, head))), *angles), v(h).unflatten(-1, (-1, head))
            for plane, states in zip((keys, values), new):
                _write(plane, states, lengths, block_table, write)

    state = x.to(acc)
    h = norm_in(state)
    if not keys_of_output:
        keep(h)
    query = _turned(norm_q(q(h).unflatten(-1, (-1, head))), *angles)
    given = keys.to(acc), values.to(acc), lengths, mask, block_table, scale, starts
    state = state + residual * norm_attended(o(tree_attention(query, *given, softcap=softcap).flatten(2)))
    z = norm_mlp(state)
    state = norm_out(state + residual * norm_after(down(_ACTIVATIONS[activation](gate(z)) * up(z))))
    if keys_of_output:
        keep(norm_state(state))
    return state.to(x.dtype).contiguous()


class _Linear:
    def __init__(self, weight: Tensor | None, bias: Tensor | None, scales: Tensor | None):
        self.weight, self.bias, self.scales = weight, bias, scales

    def __call__(self, x: Tensor) -> Tensor:
        if self.scales is not None:
            out = int8_linear(x.float(), self.weight, self.scales).to(x.dtype)  # type: ignore[arg-type]
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class _Norm:
    def __init__(self, weight: Tensor | None, eps: float, added: float):
        self.weight, self.eps, self.added = weight, eps, added

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.added)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, H, D], of which the first R numbers turn in halves."""
    rotary = cos.shape[-1]
    turning, rest = x[..., :rotary], x[..., rotary:]
    first, second = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _write(plane: Tensor, states: Tensor, lengths: Tensor, block_table: Tensor | None, write: int) -> None:
    """States [B, N, Hkv, D] into slots lengths[b] + write + n of a plane, but for those past it or in no page."""
    slot = lengths.long().clamp(min=0)[:, None] + write + torch.arange(states.shape[1], device=states.device)
    size = plane.shape[2]
    row = torch.arange(len(slot), device=slot.device)[:, None].expand_as(slot)
    inside = slot < size
    if block_table is not None:
        table = F.pad(block_table.long(), (0, 1), value=-1)
        row = table.gather(1, (slot // size).clamp(max=block_table.shape[1]))
        inside, slot = (row >= 0) & (row < len(plane)), slot % size
    plane[row[inside], :, slot[inside]] = states[inside].to(plane.dtype)
