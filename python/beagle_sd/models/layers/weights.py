"""What a decoder layer is made of, read off its modules by the names that transformers' models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_kernels import LayerWeights, Linear, Norm
from beagle_sd.models.layers.linears import parts_of

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
)


class NotTaken(Exception):
    """A layer has what decoder_layer does not do; the message says what."""


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more, or other, than its class's forward."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def weights_of(layer: Any) -> LayerWeights:
    """A decoder layer's weights where they lie, by the names that transformers' models share. Raises NotTaken for what
    is not as the op has it."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = next((names for names in _NORMS if all(hasattr(layer, name) for name in names)), None)
    if norms is None:
        raise NotTaken("its norms are not where Llama's or Gemma's are")
    _check_children(layer, ("self_attn", "mlp", *norms), check_hooks=False)
    _check_children(attention, ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    _check_children(mlp, ("gate_up_proj", "gate_proj", "up_proj", "down_proj"))
    found: dict[str, Any] = {name: _norm(getattr(layer, norm)) for name, norm in zip(_placed(norms), norms)}
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(attention, name, None)) is not None:
            found["norm_" + name[0]] = _norm(norm, attention.head_dim)
    q, k, v = _queries_keys_values(attention)
    gate, up = _gate_and_up(mlp)
    o, down = _linear(attention, "o_proj"), _linear(mlp, "down_proj")
    return LayerWeights(
        *(q, k, v, o, gate, up, down),
        **found,
        activation=_activation(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def check_dtypes(weights: LayerWeights, dtype: torch.dtype) -> None:
    """Raise NotTaken unless all is of the states' dtype, but linear weights in int8, or in bf16 beside fp32."""
    kinds = {dtype, torch.int8} | ({torch.bfloat16} if dtype == torch.float32 else set())
    linears = [one for one in weights.linears if one is not None]
    others = [one.weight for one in weights.norms if one is not None]
    others += [one.bias for one in linears if one.bias is not None]
    odd = [one.dtype for one in others if one.dtype != dtype]
    odd += [one.weight.dtype for one in linears if one.weight.dtype not in kinds]
    if odd:
        raise NotTaken(f"it has weights in {odd[0]} where states are in {dtype}")


def _queries_keys_values(attention: Any) -> list[Linear]:
    if not hasattr(attention, "qkv_proj"):
        return [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    groups = getattr(attention, "num_key_value_groups", 1)
    whole = _linear(attention, "qkv_proj")
    heads = len(whole.weight) // attention.head_dim
    keys = heads // (groups + 2) * attention.head_dim
    return _split(whole, [len(whole.weight) - 2 * keys, keys, keys])


def _gate_and_up(mlp: Any) -> list[Linear]:
    if not hasattr(mlp, "gate_up_proj"):
        return [_linear(mlp, name) for name in ("gate_proj", "up_proj")]
    whole = _linear(mlp, "gate_up_proj")
    return _split(whole, [len(whole.weight) // 2] * 2)


def _split(whole: Linear, sizes: list[int]) -> list[Linear]:
    """Layers whose weights lie one after the other in that of one."""
    if sum(sizes) != len(whole.weight):
        raise NotTaken(f"a projection of {len(whole.weight)} rows is not {' + '.join(map(str, sizes))}")
    parts = ([None] * len(sizes) if one is None else one.detach().split(sizes) for one in whole)
    return [Linear(*one) for one in zip(*parts)]


def _placed(norms: tuple[str, ...]) -> tuple[str, ...]:
    return ("norm_in", "norm_attended", "norm_mlp", "norm_after") if len(norms) == 4 else ("norm_in", "norm_mlp")


def _check_children(module: nn.Module, known: tuple[str, ...], check_hooks: bool = True) -> None:
    others = [
        name
        for name, child in module.named_children()
        if name not in known and next(child.parameters(), None) is not None
    ]
    if (changed := check_hooks and hooked(module)) or others or any(True for _ in module.parameters(recurse=False)):
        what = ", ".join(others) or ("hooks" if changed else "parameters of its own")
        raise NotTaken(f"{type(module).__name__} has {what}")


def _linear(module: Any, name: str) -> Linear:
    linear = getattr(module, name, None)
    parts = None if linear is None or linear._forward_hooks or linear._forward_pre_hooks else parts_of(linear)
    if parts is None:
        raise NotTaken(f"{type(module).__name__}.{name} is no plain linear layer ({type(linear).__name__})")
    return parts


def _norm(module: nn.Module, width: int | None = None) -> Norm:
    weight = getattr(module, "weight", None)
    eps = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), None)
    if weight is None or eps is None or weight.dim() != 1 or (width is not None and len(weight) != width):
        raise NotTaken(f"{type(module).__name__} is no RMS norm over {width or 'a state'}")
    added = _added(type(module), module, float(eps))
    return Norm(weight, float(eps), added)


_found_added: dict[type, float] = {}


def _added(kind: type, module: nn.Module, eps: float) -> float:
    """What norms of this class add to their weight: 0, or 1 as Gemma's do."""
    if kind not in _found_added:
        weight: Any = module.weight
        x = torch.linspace(-2.0, 3.0, len(weight)).to(weight.dtype)
        want = module(x).float()
        normed = x.float() * torch.rsqrt(x.float().square().mean() + eps)
        for added in (0.0, 1.0):
            if torch.allclose(normed * (weight.float() + added), want, rtol=0.02, atol=1e-3):
                _found_added[kind] = added
                break
        else:
            raise NotTaken(f"{kind.__name__} is no RMS norm")
    return _found_added[kind]


def _activation(module: Any) -> str:
    x = torch.linspace(-4.0, 4.0, 33)
    for name, function in _ACTIVATIONS.items():
        if module is not None and torch.allclose(module(x), function(x), atol=1e-5):
            return name
    raise NotTaken(f"its activation is {type(module).__name__}")
