"""Small random targets and drafts for the tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from beagle_sd import BeagleDraft

VOCAB = 97
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


def small_target(kind: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model with full attention, in fp32; the same for the same arguments."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, **overrides}
    if kind == "mistral":
        sizes.setdefault("sliding_window", None)
    config = AutoConfig.for_model(kind, **sizes)
    capped = (
        getattr(config, "attn_logit_softcapping", None) is not None
    )  # sdpa, the default of some versions, has no cap
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None).eval()


def agreeable_target(kind: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    """A small target with large embeddings: its layers add little to them, so that a fresh draft often agrees."""
    target = small_target(kind, seed, **overrides)
    target.get_input_embeddings().weight.data.mul_(32)
    return target


def small_draft(target: PreTrainedModel, seed: int = 1, **overrides) -> BeagleDraft:
    """A fresh draft for it."""
    torch.manual_seed(seed)
    return BeagleDraft.from_target(target, **overrides)
