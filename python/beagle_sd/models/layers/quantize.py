"""Linear layers put into int8 in place: of a target with its LM head, and of a draft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from beagle_sd.models.head import UnsupportedTarget, decoder_of, head_of
from beagle_sd.models.layers.int8 import GROUP, LEAST_GROUP, Int8Linear, Int8Matrix

Model = TypeVar("Model", bound=PreTrainedModel)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_(target: Model, *, group: int = GROUP) -> Model:
    """Put the decoder's linear layers and the LM head of a target on a CPU into int8, a scale for each `group` elements
    of a row, in place; returns it.

    Embeddings, norms and biases stay; a head that was tied to the embedding gets a copy of its own. Save a model
    before: transformers cannot load int8 layers. Before anything is changed, TypeError, ValueError or UnsupportedTarget
    name what cannot be quantised: another device, adapters, layers that are quantised or of a kind of their own, widths
    that groups do not divide, models that take more than text.
    """
    if not isinstance(target, PreTrainedModel):
        raise TypeError(
            f"quantize_ was given a {type(target).__name__}; allowed: a transformers model, neither compiled nor in "
            "PEFT's wrapper (merge_and_unload() gives what is in it)"
        )
    if target.config.get_text_config() is not target.config:
        raise UnsupportedTarget(f"{type(target).__name__} takes more than text; allowed: models of text alone")
    if getattr(target, "quantization_method", None) is not None:
        raise UnsupportedTarget(f"{type(target).__name__} is quantised already; allowed: floating-point weights")
    module: Any = head_of(target).module
    layers = linears_of(decoder_of(target), nn.Linear, group)
    if not layers:
        raise UnsupportedTarget(f"the decoder of {type(target).__name__} has no nn.Linear; allowed: one or more")
    _check("the LM head", module, nn.Linear, group)
    replace(layers, group)
    target.set_output_embeddings(Int8Linear(Int8Matrix.of(module.weight, group)))
    target.config.tie_word_embeddings = False
    tied = getattr(target, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        heads = {f"{name}.weight" for name, one in target.named_modules() if one is target.get_output_embeddings()}
        target.all_tied_weights_keys = {name: other for name, other in tied.items() if name not in heads}
    return target


Place = tuple[nn.Module, str]
"""A module and the name of its child."""


def linears_of(model: nn.Module, kind: type[nn.Linear], group: int) -> dict[nn.Linear, list[Place]]:
    """The model's layers of this kind and where each stands, all of them fit to be quantised; ValueError or
    UnsupportedTarget name one that is not."""
    if group < LEAST_GROUP or group % LEAST_GROUP:
        raise ValueError(f"group is {group}; allowed: multiples of {LEAST_GROUP}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {str(tensor.device)!r}; allowed: 'cpu', whose product reads int8")
    found: dict[nn.Linear, list[Place]] = {}
    for path, module, place in _children(model, ""):
        _check(path, module, kind, group)
        if type(module) is kind:
            found.setdefault(module, []).append(place)
    return found


def replace(layers: dict[nn.Linear, list[Place]], group: int) -> None:
    """Put an Int8Linear in every place of each layer."""
    for module, places in layers.items():
        new = Int8Linear(Int8Matrix.of(module.weight, group), module.bias).train(module.training)
        for parent, name in places:
            parent._modules[name] = new


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Place]]:
    for name, child in module._modules.items():
        if child is not None:
            yield f"{path}{name}", child, (module, name)
            yield from _children(child, f"{path}{name}.")


def _check(path: str, module: nn.Module, kind: type[nn.Linear], group: int) -> None:
    """Refuse what is like a linear layer of this kind and is none, or one that groups do not fit."""
    what = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, Int8Linear):
        raise UnsupportedTarget(f"{path} is in int8 already; allowed: floating-point weights")
    if hasattr(module, "base_layer"):
        raise UnsupportedTarget(
            f"{path} has an adapter ({what}); allowed: adapters merged into the weights (merge_and_unload() in PEFT)"
        )
    if not isinstance(module, nn.Linear):
        return
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.dtype in _DTYPES and weight.layout == torch.strided
    hooked = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    if type(module) is not kind or not plain or hooked:
        ways = "hooks" if hooked else f"a weight of {weight.dtype}"
        raise UnsupportedTarget(f"{path} is a {what} with {ways}; allowed: plain nn.Linear layers in floating point")
    if module.in_features % group:
        fit = [one for one in range(LEAST_GROUP, module.in_features + 1, LEAST_GROUP) if module.in_features % one == 0]
        raise ValueError(
            f"{path} has {module.in_features} inputs, which groups of {group} do not divide; allowed: "
            f"{', '.join(map(str, fit)) or 'no group: its width is no multiple of 32'}"
        )
