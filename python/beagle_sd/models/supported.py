"""What a config shows of a target that cannot be verified, and texts whose angles would change on the way."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from beagle_sd.models.head import UnsupportedTarget

_CHANGING = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""Kinds of rotary positions whose angles depend on the length of the text, and the length at which they change."""


def check_supported(config: PretrainedConfig) -> None:
    """Raise UnsupportedTarget with the reason where the config alone tells; the rest shows on first use."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedTarget(f"{kind} is an encoder-decoder; allowed: decoder-only causal LMs")
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        if not getattr(config, name, None):
            raise UnsupportedTarget(f"{kind} has no {name} in its config; allowed: transformer decoders")
    if getattr(config, "alibi", False):
        raise UnsupportedTarget(f"{kind} has ALiBi, which is a mask of its own; allowed: rotary positions, or none")


def check_length(config: PretrainedConfig, table: int | None, shortest: int, total: int) -> None:
    """Raise UnsupportedTarget for texts whose keys would be turned by other angles than those of plain decoding, or
    that a `table` of so many positions does not reach: prompts of `shortest` tokens or more, `total` with the new ones
    at most."""
    for kind, limit in _changes(config):
        if total > limit and (kind == "dynamic" or shortest <= limit):
            allowed = f"texts of at most {limit} tokens with the new ones"
            if kind == "longrope":
                allowed += f", or prompts of more than {limit}"
            raise UnsupportedTarget(
                f"{config.model_type} has rope_type={kind!r}, whose angles change at {limit} tokens, and a prompt of "
                f"{shortest} tokens goes on to {total}; allowed: {allowed}"
            )
    if table is not None and total > table:
        raise UnsupportedTarget(
            f"{config.model_type} has {table} positions; prompt and new tokens need {total}; allowed: {table} at most"
        )


def angles_change_at(config: PretrainedConfig) -> int | None:
    """The length of text at which the angles of rotary positions change; None where they do not depend on it."""
    return min((limit for _, limit in _changes(config)), default=None)


def _changes(config: PretrainedConfig) -> list[tuple[str, int]]:
    """The kinds of rotary positions whose angles change, and at which length of text."""
    kinds = [(rope.get("rope_type"), rope) for rope in _ropes(config)]
    names = [(kind, _CHANGING[kind], rope) for kind, rope in kinds if kind in _CHANGING]
    limits = [(kind, rope.get(name) or getattr(config, name, None)) for kind, name, rope in names]
    return [(kind, limit) for kind, limit in limits if limit]


def positions_in_table(decoder: PreTrainedModel, config: PretrainedConfig, tokens: nn.Module) -> int | None:
    """The positions that the model looks up in a learned table, beside that of its `tokens`; None where it has none."""
    most = getattr(config, "max_position_embeddings", None)
    others = (one for one in decoder.modules() if isinstance(one, nn.Embedding) and one is not tokens)
    if most and any(most <= one.num_embeddings <= most + 2 for one in others):  # OPT's begins with two more
        return most
    return None


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters, of each type of layers where they differ."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]
