"""A Hugging Face causal LM as the decoding loop and the trainer see it: untouched, checked, called in one way."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from beagle_sd.models.cache import TreeCache, causal, visible_keys
from beagle_sd.models.first_use import check_first_use
from beagle_sd.models.head import Head, UnsupportedTarget, decoder_of, head_of
from beagle_sd.models.layers.attention import reading
from beagle_sd.models.view import uncompiled, view_of

_LAYERS = {"full_attention", "mlp", "moe"}
"""Kinds of layers a tree may go through: those without attention change one token at a time."""
_PREFILL_CHUNK = 512
_FEW_NODES = 64
"""New tokens up to which a row's attention reads just what the row sees, by mask words: beyond, as in a prompt, SDPA's
products over a padded 4-D mask are faster."""


def check_supported(config: PretrainedConfig) -> None:
    """Raise UnsupportedTarget with the reason unless every layer is full attention over rotary positions."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedTarget(f"{kind} is an encoder-decoder; allowed: decoder-only causal LMs")
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - _LAYERS:
        raise UnsupportedTarget(f"{kind} has layers of type {sorted(layers - _LAYERS)}; allowed: full_attention only")
    if not layers and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedTarget(
            f"{kind} has sliding_window={config.sliding_window}; allowed: full attention "
            "(set sliding_window=None if your texts are shorter)"
        )
    for name in ("num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers"):
        if not getattr(config, name, None):
            raise UnsupportedTarget(f"{kind} has no {name} in its config; allowed: transformer decoders")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedTarget(
            f"{kind} has latent attention (kv_lora_rank={config.kv_lora_rank}), whose keys and values differ in width; "
            "allowed: keys and values of one width"
        )
    if getattr(config, "alibi", False):
        raise UnsupportedTarget(f"{kind} has ALiBi, which is a mask of its own; allowed: rotary positions")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not rope and getattr(config, "rope_theta", None) is None:
        raise UnsupportedTarget(
            f"{kind} has no rope_parameters in its config (its positions are learned, ALiBi, or rotary in a way of "
            "its own); allowed: rotary positions that rope_parameters describe, by which the draft turns its keys too"
        )
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise UnsupportedTarget(
            f"{kind} has rope_type={rope['rope_type']!r}, whose angles change with the length of "
            "the text; allowed: fixed angles (default, linear, yarn, llama3)"
        )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model in what torch.compile or PEFT made of it; UnsupportedTarget where there is none."""
    inner: Any = uncompiled(model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        if getattr(inner.active_peft_config, "is_prompt_learning", False):
            raise UnsupportedTarget(
                f"the target is a PEFT model with {inner.active_peft_config.peft_type.value}, whose learned prompt is "
                "no part of the tokens; allowed: adapters in the layers, such as LoRA"
            )
        inner = inner.get_base_model()  # its layers have the adapters
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedTarget(
            f"the target is a {type(inner).__name__}; allowed: a transformers model, also compiled or in PEFT's wrapper"
        )
    return inner


class Target:
    """What is used of a target: embedding, top hidden states over new tokens, LM head.

    Raises UnsupportedTarget for a model that cannot be verified as a tree: by its config, by its head (head.py), or by
    what a first use shows (first_use.py).
    """

    def __init__(self, model: nn.Module):
        model = unwrapped(model)
        config = model.config.get_text_config()
        check_supported(config)
        self.model = model
        self.config = config
        self.head: Head = head_of(model)
        self.decoder = decoder_of(model)
        # transformers calls it `cache` from 5.24 on, model by model, and warns of the older name
        named = inspect.signature(self.decoder.forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"
        self.embedding: nn.Module = model.get_input_embeddings()
        if self.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UnsupportedTarget(f"the target is in {self.dtype}; allowed: {allowed}")
        check_first_use(self)

    @cached_property
    def _view(self) -> PreTrainedModel:
        """The decoder as decoding runs it: made when it is first needed, as the model is then."""
        return decoder_of(view_of(self.model))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer is given: [...] int64 -> [..., d], with the model's scale (Gemma's is in the module,
        Granite's in the config)."""
        embedded = self.embedding(tokens)
        scale = getattr(self.config, "embedding_multiplier", None)
        return embedded if scale in (None, 1.0) else embedded * scale

    def states(self, tokens: Tensor) -> Tensor:
        """Top hidden states [B, T, d] of whole texts [B, T] int64, by the model's own forward."""
        return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def new_cache(self, batch: int, slots: int, *, page_size: int | None = None, fixed: bool = False) -> TreeCache:
        """An empty cache of `slots` positions a row, in pages of page_size if given; `fixed` as in TreeCache."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return TreeCache(
            config.num_hidden_layers,
            batch,
            heads,
            slots,
            width,
            self.dtype,
            self.device,
            page_size=page_size,
            fixed=fixed,
        )

    def forward(self, tokens: Tensor, depth: Tensor, mask: Tensor, cache: TreeCache) -> Tensor:
        """Top hidden states [B, N, d] of N new tokens a row, written to the cache behind its lengths.

        tokens [B, N] int64; depth [B, N], added to the row's length and offset to give positions; mask words [B, N, W]
        int64: which new tokens each one sees (itself too), besides everything below the row's length. A fixed cache
        needs room behind the lengths, which are not read.
        """
        batch, count = tokens.shape
        limit = None if cache.fixed else int(cache.lengths.max()) + count
        cache.expect(count, limit)
        if limit is None or count <= _FEW_NODES:
            visible = mask[:, None]
        else:
            visible = visible_keys(cache.lengths, mask, limit)
        with reading(cache):
            return self._view(
                input_ids=tokens,
                attention_mask=visible,
                position_ids=(cache.lengths + cache.offsets)[:, None] + depth.long(),
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state

    def prefill(self, tokens: Tensor, lengths: Tensor, cache: TreeCache, begin: int = 0) -> Tensor:
        """Run right-padded texts [B, T] with `lengths` [B] into a cache that holds the `begin` tokens before each, or
        nothing; hidden states [B, T, d].

        What is returned beyond a row's length is padding's and means nothing.
        """
        batch, total = tokens.shape
        states = []
        for start in range(0, total, _PREFILL_CHUNK):
            part = tokens[:, start : start + _PREFILL_CHUNK]
            cache.lengths.fill_(begin + start)
            step = torch.arange(part.shape[1], device=tokens.device).expand(batch, -1)
            states.append(self.forward(part, step, causal(batch, part.shape[1], tokens.device), cache))
        cache.lengths.copy_(begin + lengths)
        return torch.cat(states, 1)
