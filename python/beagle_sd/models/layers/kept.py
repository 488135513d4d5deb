"""What each layer of a target keeps between tokens, as the model's own cache shows after one token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from beagle_sd.models.head import UnsupportedTarget
from beagle_sd.models.layers.attention import Span

_KEYS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of a text: keys of `heads` heads [.., key_width] and values [.., value_width] a position
    (heads 0: none of its own), and `recurrence`, its states of one row in a layer of transformers' cache (None: none).

    span: how far back its queries see. mixers: the modules that take the recurrence on, by name.
    """

    heads: int = 0
    key_width: int = 0
    value_width: int = 0
    dtype: torch.dtype = torch.float32
    span: Span = Span()
    recurrence: LinearAttentionLayer | None = None
    mixers: tuple[str, ...] = ()


class _Watched(DynamicCache):
    """Notes which module asks for a layer's recurrent states."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.mixers: dict[int, dict[int, nn.Module]] = {}

    def _note(self, layer_idx: int) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                self.mixers.setdefault(layer_idx, {})[id(owner)] = owner
                return
            frame = frame.f_back  # type: ignore[assignment]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args, **kwargs) -> Tensor:
        self._note(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args, **kwargs) -> Tensor:
        self._note(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def kept_by(decoder: PreTrainedModel, config: PretrainedConfig, run: Callable[[Any], Any]) -> tuple[Kept, ...]:
    """What the decoder's layers keep; `run` takes it over one token with the cache given.

    UnsupportedTarget for a model that does not go through transformers' caches, or whose layers keep what no verified
    branch could be taken back from.
    """
    name = type(decoder).__name__
    try:
        cache = _Watched(config)
    except Exception as error:
        types = sorted(set(getattr(config, "layer_types", None) or ()))
        raise UnsupportedTarget(
            f"{name} has layers of type {types}, for which transformers has no cache ({type(error).__name__}: {error})"
            "; allowed: layers of attention, or recurrent ones, that transformers' caches know"
        ) from error
    try:
        run(cache)
    except (UnsupportedTarget, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedTarget(
            f"{name} cannot run over a cache that transformers makes for it ({type(error).__name__}: {error}); "
            "allowed: models that decode with a cache of transformers"
        ) from error
    names = {id(module): path for path, module in decoder.named_modules()}
    types = getattr(config, "layer_types", None) or [None] * len(cache.layers)
    found = []
    for index, layer in enumerate(cache.layers):
        mixers = tuple(names[one] for one in cache.mixers.get(index, {}) if one in names)
        found.append(_kept(name, index, layer, types[index] if index < len(types) else None, mixers))
    if not any(one.heads or one.recurrence is not None for one in found):
        raise UnsupportedTarget(
            f"{name} keeps nothing of a text in transformers' cache; allowed: models that decode with a cache"
        )
    return tuple(found)


def _kept(name: str, index: int, layer: Any, layer_type: str | None, mixers: tuple[str, ...]) -> Kept:
    keys = getattr(layer, "keys", None)
    kind = type(layer).__name__
    linear = isinstance(layer, LinearAttentionLayer)
    if isinstance(layer, CacheLayerMixin) and not linear and type(layer) not in _KEYS:
        raise UnsupportedTarget(
            f"{name} keeps more than keys and values in layer {index} ({kind}); allowed: attention to the keys of the "
            "positions that a mask lets through, and recurrent layers"
        )
    fields: dict[str, Any] = {}
    if isinstance(keys, Tensor) and keys.dim() == 4:
        fields = {"heads": keys.shape[1], "key_width": keys.shape[3], "dtype": keys.dtype}
        fields["value_width"] = layer.values.shape[3]
        size = getattr(layer, "sliding_window", None)
        fields["span"] = Span(chunk=size) if layer_type == "chunked_attention" else Span(size)
    if linear and states_of(layer):
        for held in ("conv_states", "recurrent_states"):  # their shapes, dtypes and device without their memory
            setattr(layer, held, each(getattr(layer, held), lambda one: one.new_zeros(()).expand(one.shape)))
        fields |= {"recurrence": layer, "mixers": mixers}
        if len(mixers) != 1:
            raise UnsupportedTarget(
                f"{len(mixers)} modules of {name} were seen to take the states of layer {index} ({kind}) on; allowed: "
                "recurrent layers of one module that hands its states to transformers' cache"
            )
    return Kept(**fields)


def each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The states of a layer of transformers' cache, one tensor or several by number, each changed."""
    if isinstance(values, dict):
        return {number: None if value is None else change(value) for number, value in values.items()}
    return None if values is None else change(values)


def states_of(layer: LinearAttentionLayer) -> list[Tensor]:
    """All recurrent states [B, ...] of a layer of transformers' cache."""
    found: list[Tensor] = []
    for values in (layer.conv_states, layer.recurrent_states):
        each(values, lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
    return found
