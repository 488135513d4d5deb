"""Every op in plain PyTorch: the definition the faster backends are held to."""

from . import (
    accept_tree,
    adjust_logits,
    block_attention,
    build_tree,
    choose_tokens,
    compact_cache_,
    decoder_layer,
    distill_loss,
    extend_attention,
    int8_linear,
    perturb_logits,
    skinny_linear,
    top_candidates,
    tree_attention,
    verify_chain,
    verify_tree,
)

__all__ = [
    "accept_tree",
    "adjust_logits",
    "block_attention",
    "build_tree",
    "choose_tokens",
    "compact_cache_",
    "decoder_layer",
    "distill_loss",
    "extend_attention",
    "int8_linear",
    "perturb_logits",
    "skinny_linear",
    "top_candidates",
    "tree_attention",
    "verify_chain",
    "verify_tree",
]
