"""A target's LM head as the target itself applies it: with its logit scale and soft-cap, checked against the model."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class UnsupportedTarget(ValueError):
    """The target has something that drafting or tree verification cannot honour; the message names it."""


class Head:
    """logits = cap * tanh(scale * W h / cap): [..., d] -> [..., V]; without a cap scale * W h.

    scale is `logit_scale` (Cohere), `logits_scaling` (HyperCLOVA X) or one over it (Granite); cap is
    `final_logit_softcapping` (Gemma 2).
    """

    def __init__(self, linear: nn.Linear, scale: float = 1.0, cap: float | None = None):
        self.linear, self.scale, self.cap = linear, scale, cap

    @property
    def weight(self) -> Tensor:
        """W [V, d], without the scale."""
        return self.linear.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        return self.capped(logits if self.scale == 1.0 else logits * self.scale)

    def capped(self, logits: Tensor) -> Tensor:
        """The soft-cap alone, for logits that have the scale."""
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


_found: WeakKeyDictionary[PreTrainedModel, Head] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; UnsupportedTarget where scale and cap of the config do not explain the model's own logits.

    On a model's first use a token is run through it, since configs do not tell: Granite divides by
    `logits_scaling` where HyperCLOVA X multiplies.
    """
    if (known := _found.get(model)) is not None and known.linear is model.get_output_embeddings():
        return known
    config = model.config.get_text_config()
    linear = model.get_output_embeddings()
    if linear is None:
        raise UnsupportedTarget(f"{type(model).__name__} has no LM head; allowed: causal LMs")
    if getattr(linear, "bias", None) is not None:
        raise UnsupportedTarget(f"{config.model_type}'s LM head has a bias; allowed: heads without")
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    if model.training or linear.weight.is_meta:  # dropout, or nothing to compute with: no probe
        return Head(linear, scale, cap)
    for candidate in {scale: None, 1.0 / scale: None}:
        head = Head(linear, candidate, cap)
        if _explains(head, model):
            _found[model] = head
            return head
    raise UnsupportedTarget(
        f"the logits of {type(model).__name__} are not its LM head's over its top hidden states; "
        "allowed: heads with at most logit_scale, logits_scaling and final_logit_softcapping"
    )


@torch.inference_mode()
def _explains(head: Head, model: PreTrainedModel) -> bool:
    ids = torch.tensor([[model.config.get_text_config().vocab_size // 2]], device=head.weight.device)
    want = model(input_ids=ids, use_cache=False).logits.float()
    have = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if have.shape != want.shape:
        return False
    finite = want.isfinite() & have.isfinite()  # broken weights are told of where their logits are used
    return bool(((have - want).abs() <= 0.01 * want.abs().where(finite, 0).max())[finite].all())
