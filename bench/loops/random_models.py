"""Targets of known shapes and drafts for them, with random weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from beagle_sd.models.draft import BeagleDraft

MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=200,
    ),
    "135M": dict(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "8B": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    ),
}
DRAFT_VOCAB = {"tiny": 100, "135M": 8192, "8B": 16384}


def random_model(name: str, device: str) -> tuple[PreTrainedModel, BeagleDraft]:
    """A Llama of this shape and a draft for it, random weights: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(
        **MODELS[name], max_position_embeddings=8192, eos_token_id=None, bos_token_id=None, pad_token_id=0
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    vocabulary = torch.arange(DRAFT_VOCAB[name], device=device) * (config.vocab_size // DRAFT_VOCAB[name])
    draft: Any = BeagleDraft.from_target(model, vocabulary)
    draft = draft.to(dtype).eval()
    with torch.no_grad():
        # as sure of itself as a trained one, whose trees are deep: logits with a deviation of 10
        draft.norm_output.weight.fill_(10.0 / (float(draft.head.float().std()) * math.sqrt(config.hidden_size)))
    return model, draft


def weight_bytes(model: torch.nn.Module | None) -> int:
    return sum(x.nbytes for x in model.parameters()) if model is not None else 0
