"""The verification ops by the extension: the "cpu" and "cuda" backends, an op a file over the same csrc."""

from . import (
    accept_tree,
    adjust_logits,
    build_tree,
    choose_tokens,
    compact_cache_,
    decoder_layer,
    int8_linear,
    join_branch,
    lookup,
    perturb_logits,
    skinny_linear,
    top_candidates,
    verify_chain,
    verify_tree,
)

__all__ = [
    "accept_tree",
    "adjust_logits",
    "build_tree",
    "choose_tokens",
    "compact_cache_",
    "decoder_layer",
    "int8_linear",
    "join_branch",
    "lookup",
    "perturb_logits",
    "skinny_linear",
    "top_candidates",
    "verify_chain",
    "verify_tree",
]
