"""A target's LM head as the target itself applies it: with its logit scale and soft-cap, checked against the model."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from beagle_sd.models.halved import halved_weight
from beagle_sd.models.layers.int8 import Int8Linear, Int8Matrix
from beagle_sd.models.layers.linears import linear


class UnsupportedTarget(ValueError):
    """The target has something that drafting or tree verification cannot honour; the message names it."""


class Head:
    """logits = cap * tanh(scale * W h / cap): [..., d] -> [..., V]; without a cap scale * W h.

    scale is `logit_scale` (Cohere), `logits_scaling` (HyperCLOVA X), one over it (Granite) or `output_multiplier`
    (Muse); cap is `final_logit_softcapping` (Gemma 2).
    """

    def __init__(self, module: nn.Module, scale: float = 1.0, cap: float | None = None):
        self.module, self.scale, self.cap = module, scale, cap

    @property
    def matrix(self) -> Tensor | Int8Matrix:
        """W [V, d] as `linear` takes it, without the scale."""
        return self.module.matrix if isinstance(self.module, Int8Linear) else self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """W [V, d], without the scale; made anew from a head in int8, in float32."""
        return self.matrix.floats() if isinstance(self.matrix, Int8Matrix) else self.matrix

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def size(self) -> int:
        """V."""
        return len(self.matrix)

    @property
    def half(self) -> Tensor | None:
        """W in bf16, if `halve_` has kept it."""
        return halved_weight(self.module)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.matrix, half=self.half)
        return self.capped(logits if self.scale == 1.0 else logits * self.scale)

    def capped(self, logits: Tensor) -> Tensor:
        """The soft-cap alone, for logits that have the scale."""
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """What gives the top hidden states; UnsupportedTarget for a model that names nothing beneath its LM head."""
    for decoder in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if isinstance(decoder, nn.Module) and decoder is not model:
            return decoder  # type: ignore[return-value]
    raise UnsupportedTarget(f"{type(model).__name__} names no decoder beneath its LM head; allowed: models that do")


_found: WeakKeyDictionary[PreTrainedModel, Head] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; UnsupportedTarget where its weight, with scale and cap of the config, does not explain the
    model's own logits.

    On a model's first use a token is run through it, since configs do not tell: Granite divides by
    `logits_scaling` where HyperCLOVA X multiplies, and Cohere's vision models leave `logit_scale` out.
    """
    module = model.get_output_embeddings()
    if (known := _found.get(model)) is not None and known.module is module:
        return known
    if module is None:
        raise UnsupportedTarget(f"{type(model).__name__} has no LM head; allowed: causal LMs")
    _check_weight(module)
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None) or None
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(module, scale, cap)
    if model.training or head.device.type == "meta":  # dropout, or nothing to compute with: no probe
        return head
    _check_product(module)
    scales = dict.fromkeys((scale, 1.0 / scale, getattr(config, "output_multiplier", None) or 1.0, 1.0))
    want, states = _one_token(model)
    for candidate, soft in itertools.product(scales, dict.fromkeys((cap, None))):
        head = Head(module, candidate, soft)
        if _explains(head, want, states):
            _found[model] = head
            return head
    raise UnsupportedTarget(
        f"the logits of {type(model).__name__} are not its LM head's over its top hidden states; "
        "allowed: heads with at most logit_scale, logits_scaling and final_logit_softcapping"
    )


def _check_weight(module: nn.Module) -> None:
    """The loop, the loss and the draft multiply by the head's weight themselves: it must be a matrix, and all there
    is."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(module, "base_layer"):
        raise UnsupportedTarget(
            f"the LM head has an adapter ({kind}), which its weight alone leaves out; allowed: adapters elsewhere, or "
            "merged into the weights (merge_and_unload() in PEFT)"
        )
    if isinstance(module, Int8Linear):
        return
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        what = type(weight).__name__ if isinstance(weight, Tensor) else "no tensor"
        dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise UnsupportedTarget(
            f"the LM head is a {kind}, whose weight is {what}{dtype}; allowed: a head of plain floating-point weights "
            "(quantisers can leave it out: modules_to_not_convert, ignore, or a filter)"
        )
    if weight.is_meta and hasattr(module, "_hf_hook"):
        raise UnsupportedTarget(
            "the LM head is offloaded: its weight is not in memory between calls; allowed: offloaded layers, with the "
            "head (and the embedding it may be tied to) on the device, by a device_map that says so"
        )
    if getattr(module, "bias", None) is not None:
        raise UnsupportedTarget("the LM head has a bias; allowed: heads without")


@torch.inference_mode()
def _check_product(module: nn.Module) -> None:
    if isinstance(module, Int8Linear):  # it is that product
        return
    weight: Tensor = module.weight  # type: ignore[assignment]
    signs = 1.0 - 2.0 * (torch.arange(2 * weight.shape[1], device=weight.device) * 7 % 5 % 2)
    x = signs.view(2, -1).to(weight.dtype)
    have, want = module(x).float(), linear(x, weight).float()
    finite = want.isfinite() & have.isfinite()
    if have.shape != want.shape or not _close(have, want, finite):
        raise UnsupportedTarget(
            f"the LM head ({type(module).__name__}) gives other values than the product with its weight; allowed: "
            "heads that are that product alone (a forward of its own, an adapter or a quantiser changes it)"
        )


@torch.inference_mode()
def _one_token(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The model's own logits and top hidden states of one token."""
    weight: Tensor = model.get_output_embeddings().weight
    ids = torch.tensor([[model.config.get_text_config().vocab_size // 2]], device=weight.device)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        return logits.float(), decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    except (UnsupportedTarget, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise UnsupportedTarget(
            f"{type(model).__name__} does not run on text alone ({type(error).__name__}: {error}); allowed: models "
            "that give logits, and a decoder beneath that gives hidden states, for tokens"
        ) from error


@torch.inference_mode()
def _explains(head: Head, want: Tensor, states: Tensor) -> bool:
    have = head(states).float()
    if have.shape != want.shape:
        return False
    finite = want.isfinite() & have.isfinite()  # broken weights are told of where their logits are used
    return _close(have, want, finite)


def _close(have: Tensor, want: Tensor, where: Tensor) -> bool:
    return bool(((have - want).abs() <= 0.01 * want.abs().where(where, 0).max())[where].all())
