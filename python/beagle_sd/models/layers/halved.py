"""Weights in 16 bits beside those in 32: checkpoints in bf16 lose nothing by it, and decoding on a CPU reads half.

A model that was saved in bf16 and loaded in fp32 has weights that bf16 holds exactly. A product with them, in fp32,
is the same to the last bit from either copy; and decoding's time on a CPU is the time that its weights take to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

_NAME = "_beagle_halved"
_SAMPLES = 64
_Model = TypeVar("_Model", bound=nn.Module)


class _Halved(NamedTuple):
    """A weight in bf16, and the weight that it was made of: where it lay and how often it had been written."""

    weight: Tensor
    address: int
    version: int


def halve_(model: _Model) -> _Model:
    """Keep a copy in bf16 of each linear layer's weight that bf16 holds exactly, for decoding in fp32 on a CPU: the
    results stay those of fp32 bit for bit, and half as much is read for a token.

    Takes half as much memory again as those weights. The model itself is unchanged: its own forward, training and
    saving go by its weights in fp32. A weight that changes later is used as it is, until `halve_` is called again.
    Returns the model. Raises ValueError for a model that is not in fp32 on a CPU.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linears:
        weight = module.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(
                f"halve_: a {type(module).__name__} has its weight in {weight.dtype} on {weight.device}; allowed: "
                "models in float32 on a CPU"
            )
    known: dict[tuple, Tensor | None] = {}
    for module in linears:
        weight = module.weight.detach()
        place = weight.data_ptr(), weight.shape, weight.stride()
        if place not in known:
            known[place] = halved(weight)
        module.__dict__.pop(_NAME, None)
        if (half := known[place]) is not None:
            module.__dict__[_NAME] = _Halved(half, weight.data_ptr(), _version(module.weight))
    return model


def halved(weight: Tensor) -> Tensor | None:
    """A weight in bf16; None where that would round."""
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else None


def halved_weight(module: nn.Module) -> Tensor | None:
    """The copy in bf16 of a linear layer's weight; None where there is none, or the weight has changed since."""
    kept: _Halved | None = module.__dict__.get(_NAME)
    if kept is None:
        return None
    weight: Any = module.weight
    if kept.address != weight.data_ptr() or kept.version != _version(weight) or kept.weight.shape != weight.shape:
        return None
    # writing through .data, as PEFT does where it merges, leaves the version as it was
    step = max(1, weight.numel() // _SAMPLES)
    have, want = (one.detach().reshape(-1)[::step] for one in (kept.weight, weight))
    return kept.weight if torch.equal(have.float(), want) else None


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
