"""A model as decoding runs it: the same weights under the same names, attention and linear layers of its own.

A server scores texts with the model while another thread decodes with it, so nothing of the model itself may change.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from beagle_sd.models.layers.attention import NAME, tempered_by_position
from beagle_sd.models.layers.linears import few_rows_forward
from beagle_sd.models.layers.whole import take_over


def view_of(model: PreTrainedModel, *, attention: str | None = NAME) -> PreTrainedModel:
    """A model of new modules over `model`'s parameters and buffers, whose attention is beagle_tree (with None the
    model's own) and whose plain linear layers take few rows on a CPU through skinny_linear.

    Weights that are cast, moved or loaded later are seen, modules that are put in place of others are not. Compiled
    parts are taken as they were before they were compiled.
    """
    copied: dict[int, Any] = {}
    view = _copy(model, copied)
    for old in _uncompiled_modules(model):
        _bind(copied[id(old)], copied)
        if attention == NAME and tempered_by_position(old):
            copied[id(old)].__dict__["attn_temperature_tuning"] = False  # attention.py does it, by each one's position
    if attention == NAME:
        take_over({copied[id(old)]: old for old in _uncompiled_modules(model)})
    if attention is not None:
        view.config._attn_implementation = attention
    return view


def uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile was given, if the module is what it made."""
    return getattr(module, "_orig_mod", module)


def _uncompiled_modules(model: nn.Module) -> list[nn.Module]:
    return list({id(uncompiled(module)): uncompiled(module) for module in model.modules()}.values())


def _copy(module: nn.Module, copied: dict[int, Any]) -> Any:
    """The module's copy, and those of its children, each made once: with the very same parameters and buffers."""
    module = uncompiled(module)
    if id(module) not in copied:
        new = copied[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__.update(module.__dict__)
        hooks = {name: kept.copy() for name, kept in module.__dict__.items() if "_hooks" in name and hasattr(kept, "copy")}
        new.__dict__.update(hooks)  # a forward that adds hooks, to record states, adds them to the view alone
        new.__dict__["_modules"] = {
            name: child if child is None else _copy(child, copied) for name, child in module._modules.items()
        }
    return copied[id(module)]


def _bind(new: nn.Module, copied: dict[int, Any]) -> None:
    """Let what the copy keeps beside its children - its config, a forward that a hook put there - be of the copies."""
    kept = new.__dict__
    kept["_compiled_call_impl"] = None
    for name, value in list(kept.items()):
        if name not in ("_modules", "_parameters", "_buffers"):
            kept[name] = _bound(value, copied)
    if (forward := few_rows_forward(new)) is not None:
        kept["forward"] = forward


def _bound(value: Any, copied: dict[int, Any]) -> Any:
    if id(value) in copied:
        return copied[id(value)]
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value, copied)  # with `copied` as its memo: one copy of each config
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _bound(value.__self__, copied))
    if isinstance(value, functools.partial):
        arguments = [_bound(argument, copied) for argument in value.args]
        return functools.partial(_bound(value.func, copied), *arguments, **value.keywords)
    if (inner := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
        return _bound(inner, copied)
    return value
