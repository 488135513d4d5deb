"""Tokens that stand for more than text: those that end an answer, one notion for decoding, for written answers and for
what is learnt, and those that a config names."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(target: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """The ids that end an answer of this pair, each once: those that the target's generation config lists, which end
    it in `target.generate`, then the tokenizer's eos. Either may be left out; the list may be empty."""
    ids = [] if target is None else token_ids(target.generation_config.eos_token_id)
    ids += [] if tokenizer is None else token_ids(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))


def named_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that the model's config names, such as a picture's, which may lie outside of its vocabulary."""
    return [value for name, value in model.config.to_dict().items() if "token" in name and type(value) is int]


def token_ids(value) -> list[int]:
    """Ids as configs and callers give them, None (no id), one, several or a tensor of them, as a list."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return [int(one) for one in value] if hasattr(value, "__iter__") else [int(value)]
