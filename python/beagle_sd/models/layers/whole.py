"""Decoder layers in decoding: few rows on a CPU go through `decoder_layer`, one op a layer, where it gives what the
layer's own modules give.

What a family is made of is read off its modules - which projections, norms, scales - and how it attends off the call
that its own attention makes on first use. Then the op's result is compared with the layer's own: only a layer whose
results are the same but for rounding is taken over; any other runs as its model has it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_kernels import LayerWeights, Linear, Norm, backends
from beagle_kernels.decoder_layer import flat
from beagle_sd.models.cache import TreeCache
from beagle_sd.models.layers.attention import cache_being_read, seen
from beagle_sd.models.layers.linears import few_rows, is_plain, read_weight

_ROUNDING = {torch.float32: (1e-4, 2e-6), torch.bfloat16: (0.05, 0.01), torch.float16: (0.01, 2e-3)}
"""How far a layer's result may be from its own modules', as shares of what the layer adds and of what comes out."""
_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
)
_verdicts: WeakKeyDictionary[nn.Module, tuple[tuple, Verdict]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Verdict:
    """Whether a layer is taken over: what its attention was given (scale, softcap), or why it is not."""

    scale: float = 1.0
    softcap: float | None = None
    why_not: str | None = None


class NotTaken(Exception):
    """A layer has what the op does not do; the message says what."""


def whole_forward(layer: nn.Module, original: nn.Module) -> WholeLayer | None:
    """A forward for a view's `layer`, whose own is that of `original` over the same weights; None unless it has an
    attention and an MLP as decoder layers do, on a CPU that the extension serves."""
    attention = getattr(layer, "self_attn", None)
    if getattr(attention, "layer_idx", None) is None or "forward" in layer.__dict__ or not hasattr(layer, "mlp"):
        return None
    return WholeLayer(layer, original) if _served() else None


@functools.cache
def _served() -> bool:
    return backends.why_not("decoder_layer", "cpu", torch.device("cpu")) is None


class WholeLayer:
    """The forward of one decoder layer."""

    def __init__(self, layer: nn.Module, original: nn.Module):
        self.layer, self.original = layer, original
        self.own = type(layer).forward.__get__(layer)
        self.attention: Any = layer.self_attn
        self.index: int = self.attention.layer_idx
        self.known: tuple[Any, ...] | None = None  # the op's arguments, while the weights stay where they are

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_being_read()
        words, angles = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if not (cache is not None and angles is not None and not args and self._few(hidden_states, words, cache)):
            return self.own(hidden_states, *args, **kwargs)
        verdict = self.verdict
        if verdict is None:
            return self._try(hidden_states, cache, kwargs)
        if verdict.why_not is not None:
            return self.own(hidden_states, **kwargs)
        return self._run(hidden_states, words, angles, cache, verdict)

    def _few(self, x: Tensor, words: Tensor | None, cache: TreeCache) -> bool:
        return words is not None and words.dtype == torch.int64 and cache.recording and few_rows(x)

    @property
    def verdict(self) -> Verdict | None:
        """What first use found; None before it, and when the layer has changed since."""
        known = _verdicts.get(self.original)
        return known[1] if known is not None and known[0] == self._used_as() else None

    def _used_as(self) -> tuple:
        weight = next(self.layer.parameters())
        return weight.dtype, weight.device, weight.data_ptr()

    def _try(self, x: Tensor, cache: TreeCache, kwargs: dict[str, Any]) -> Any:
        """The layer's own result, with which the op's is compared."""
        want = self.own(x, **kwargs)
        try:
            if not isinstance(want, Tensor):
                raise NotTaken(f"its layers return a {type(want).__name__}")
            given = cache.attended.get(id(self.attention))
            if given is None or given.unlike is not None:
                raise NotTaken(given.unlike if given is not None else "its attention is its own")
            verdict = Verdict(given.scale, given.softcap)
            have = self._run(x, kwargs["attention_mask"], kwargs["position_embeddings"], cache, verdict)
            _compare(x, have, want)
        except NotTaken as reason:
            verdict = Verdict(why_not=str(reason))
        _verdicts[self.original] = self._used_as(), verdict
        return want

    def _run(self, x: Tensor, words: Tensor, angles: Any, cache: TreeCache, verdict: Verdict) -> Tensor:
        if self.known is None:
            self.known = flat(weights_of(self.layer))
        span = cache.span_of(self.index, None)
        visible, starts = cache.once(("seen", span), lambda: seen(words[:, 0], cache.lengths, cache.depth, span))
        cos, sin = angles
        if cos.shape[0] != x.shape[0]:
            cos, sin = cos.expand(len(x), -1, -1), sin.expand(len(x), -1, -1)
        # the op itself: the public function's checks would cost a small model a percent
        return torch.ops.beagle.decoder_layer.default(
            x,
            *self.known,
            cos,
            sin,
            *cache.layer(self.index),
            cache.lengths,
            visible,
            cache.table(span),
            starts,
            verdict.scale,
            verdict.softcap,
            0,
            False,
            "cpu",
        )


def weights_of(layer: nn.Module) -> LayerWeights:
    """A decoder layer's weights where they lie, by the names that transformers' models share. Raises NotTaken for what
    is not as the op has it."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = next((names for names in _NORMS if all(hasattr(layer, name) for name in names)), None)
    if norms is None:
        raise NotTaken("its norms are not where Llama's or Gemma's are")
    _check_children(layer, ("self_attn", "mlp", *norms))
    _check_children(attention, ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"))
    _check_children(mlp, ("gate_proj", "up_proj", "down_proj", "act_fn", "activation_fn"))
    found = {name: _norm(getattr(layer, norm)) for name, norm in zip(_placed(norms), norms)}
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(attention, name, None)) is not None:
            found["norm_" + name[0]] = _norm(norm, attention.head_dim)
    return LayerWeights(
        *(_linear(attention, name + "_proj") for name in ("q", "k", "v", "o")),
        *(_linear(mlp, name + "_proj") for name in ("gate", "up", "down")),
        **found,
        activation=_activation(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _placed(norms: tuple[str, ...]) -> tuple[str, ...]:
    return ("norm_in", "norm_attended", "norm_mlp", "norm_after") if len(norms) == 4 else ("norm_in", "norm_mlp")


def _check_children(module: nn.Module, known: tuple[str, ...]) -> None:
    hooks = module._forward_hooks or module._forward_pre_hooks
    others = [name for name, child in module.named_children() if name not in known and any(child.parameters())]
    if hooks or others or any(True for _ in module.parameters(recurse=False)):
        what = ", ".join(others) or ("hooks" if hooks else "parameters of its own")
        raise NotTaken(f"{type(module).__name__} has {what}")


def _linear(module: nn.Module, name: str) -> Linear:
    linear = getattr(module, name, None)
    if linear is None or not is_plain(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        raise NotTaken(f"{type(module).__name__}.{name} is no plain linear layer ({type(linear).__name__})")
    return Linear(read_weight(linear), linear.bias)


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


def _compare(x: Tensor, have: Tensor, want: Tensor) -> None:
    of_added, of_all = _ROUNDING[x.dtype]
    x, have, want = x.float(), have.float(), want.float()
    allowed = of_added * (want - x).norm(dim=-1) + of_all * want.norm(dim=-1)
    apart = (have - want).norm(dim=-1)
    if not bool((apart <= allowed).all()):
        raise NotTaken(f"the op's result differs by {float((apart / want.norm(dim=-1)).max()):.1e} from its own")
