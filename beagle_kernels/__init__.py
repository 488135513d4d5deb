"""Fused kernels for lossless speculative decoding with cross-attention drafts (Beagle, arXiv 2505.24544)."""

from . import compiled as compiled
from . import cpu as cpu
from . import reference as reference
from . import triton as triton
from .accept_tree import accept_tree
from .adjust_logits import adjust_logits
from .backends import BACKENDS, BackendError
from .block_attention import block_attention
from .build_tree import build_tree
from .choose_tokens import choose_tokens
from .compact_cache_ import compact_cache_
from .decoder_layer import decoder_layer
from .distill_loss import distill_loss
from .extend_attention import extend_attention
from .int8_linear import int8_linear
from .join_branch import join_branch
from .lookup import lookup
from .perturb_logits import perturb_logits
from .skinny_linear import skinny_linear
from .top_candidates import top_candidates
from .tree_attention import tree_attention
from .types import (
    STATUS_BAD_TREE,
    STATUS_NAN,
    STATUS_NO_FINITE,
    Adjustments,
    DraftTree,
    LayerWeights,
    Linear,
    Norm,
    Sampling,
    Verdict,
)
from .verify_chain import verify_chain
from .verify_tree import verify_tree

__version__ = "0.1.0"

__all__ = [
    "Adjustments",
    "BACKENDS",
    "BackendError",
    "DraftTree",
    "LayerWeights",
    "Linear",
    "Norm",
    "STATUS_BAD_TREE",
    "STATUS_NAN",
    "STATUS_NO_FINITE",
    "Sampling",
    "Verdict",
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
    "join_branch",
    "lookup",
    "perturb_logits",
    "skinny_linear",
    "top_candidates",
    "tree_attention",
    "verify_chain",
    "verify_tree",
]
