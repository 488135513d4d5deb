"""`attn_implementation="beagle_tree"`: the target's attention over a fixed cache, its tree mask as words or 4-D."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from beagle_kernels import tree_attention
from beagle_sd.models.cache import TreeCache
from beagle_sd.models.head import UnsupportedTarget

NAME = "beagle_tree"
_MEANINGLESS = {"position_ids", "cache_position", "use_cache", "layer_idx", "is_causal", "return_dict"}
"""What models hand on beside the mask that says nothing on which keys a query sees, or says what the mask does."""
_reading = threading.local()


@contextmanager
def reading(cache: TreeCache) -> Iterator[None]:
    """Inside, a mask of words [B, 1, N, W] int64 speaks of `cache`: its lengths, and its pages if it has any. Whether
    the model's attention was beagle_tree is then known of it.

    transformers hands a 4-D mask on as it is, so words reach the attention where a mask [B, 1, N, S] would.
    """
    before, _reading.cache = getattr(_reading, "cache", None), cache
    try:
        yield
    finally:
        _reading.cache = before


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention that reads each key head once: the query heads that share it are stacked as queries.

    query [B, Hq, N, D]; key, value [B, Hkv, L, D]; mask [B, 1, N, L], bool or additive. Returns [B, Hq, N, D].
    """
    batch, heads, count, width = query.shape
    group = heads // key.shape[1]
    stacked = query.reshape(batch, key.shape[1], group * count, width)
    if mask is not None and group > 1:
        mask = mask.repeat(1, 1, group, 1)
    return F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scale).view_as(query)


def _beagle_tree(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    cache: TreeCache | None = getattr(_reading, "cache", None)
    if cache is not None:
        cache.attended = True
    if unknown := [name for name, value in kwargs.items() if _means_something(name, value)]:
        raise UnsupportedTarget(
            f"{type(module).__name__} gives its attention {', '.join(sorted(unknown))}; allowed: a softmax over the "
            "keys that its mask lets through, and nothing else"
        )
    if attention_mask is None and query.shape[2] > 1:
        raise UnsupportedTarget(
            f"{type(module).__name__} does not hand its mask on to the attention; allowed: attention by the mask given"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None and attention_mask is not None and attention_mask.dtype == torch.int64:
        return tree_attention(
            query.transpose(1, 2),
            key,
            value,
            cache.lengths,
            attention_mask[:, 0],
            scale=scale,
            block_table=cache.block_table,
        ), None
    return grouped_attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def _means_something(name: str, value) -> bool:
    off = value is None or name == "softcap" and value == 0.0
    return not (off or name in _MEANINGLESS or name.startswith("output_"))


AttentionInterface.register(NAME, _beagle_tree)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
