"""What a config shows of a target that cannot be verified, and texts whose angles would change on the way."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

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


def check_length(config: PretrainedConfig, shortest: int, total: int) -> None:
    """Raise UnsupportedTarget for texts whose keys would be turned by other angles than those of plain decoding, or
    that the model has no positions for: prompts of `shortest` tokens or more, `total` with the new ones at most."""
    for rope in _ropes(config):
        kind = rope.get("rope_type")
        if kind not in _CHANGING:
            continue
        limit: int = rope.get(_CHANGING[kind]) or getattr(config, _CHANGING[kind], None) or total
        if total > limit and (kind == "dynamic" or shortest <= limit):
            allowed = f"texts of at most {limit} tokens with the new ones"
            if kind == "longrope":
                allowed += f", or prompts of more than {limit}"
            raise UnsupportedTarget(
                f"{config.model_type} has rope_type={kind!r}, whose angles change at {limit} tokens, and a prompt of "
                f"{shortest} tokens goes on to {total}; allowed: {allowed}"
            )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and total > positions and _has_table(config):
        raise UnsupportedTarget(
            f"{config.model_type} has {positions} positions; prompt and new tokens need {total}; allowed: {positions} at most"
        )


def ends_matter(config: PretrainedConfig) -> bool:
    """Whether the model must not be given positions beyond a text's end, as drafted tokens may have: angles would
    change for all, or there are no more positions."""
    ropes = _ropes(config)
    return any(rope.get("rope_type") in _CHANGING for rope in ropes) or _has_table(config)


def _has_table(config: PretrainedConfig) -> bool:
    """Whether positions may be looked up in a table: there are no rotary ones."""
    return not _ropes(config) and getattr(config, "rope_theta", None) is None


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters, of each type of layers where they differ."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]
