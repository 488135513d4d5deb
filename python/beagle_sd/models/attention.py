"""`attn_implementation="beagle_tree"`: the target's attention over a fixed cache, its tree mask as words or 4-D."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from beagle_kernels import tree_attention
from beagle_sd.models.cache import TreeCache
from beagle_sd.models.temporary import TemporaryChange

NAME = "beagle_tree"
_read = threading.local()


@contextmanager
def reading(cache: TreeCache) -> Iterator[None]:
    """Inside, a mask of words [B, 1, N, W] int64 speaks of `cache`: its lengths, and its pages if it has any.

    transformers hands a 4-D mask on as it is, so words reach the attention where a mask [B, 1, N, S] would.
    """
    before, _read.cache = getattr(_read, "cache", None), cache
    try:
        yield
    finally:
        _read.cache = before


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


def _beagle_tree(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    if kwargs.get("softcap") is not None:
        raise ValueError("attention soft-capping is not supported by beagle_tree; use attn_implementation='eager'")
    if attention_mask is None and query.shape[2] > 1:
        raise ValueError("beagle_tree needs the mask that the decoding loop gives it")
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        cache = _read.cache
        return tree_attention(
            query.transpose(1, 2),
            key,
            value,
            cache.lengths,
            attention_mask[:, 0],
            scale=scaling,
            block_table=cache.block_table,
        ), None
    return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _beagle_tree)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _use_tree_attention(model: PreTrainedModel) -> str:
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return before


tree_attention_of = TemporaryChange(_use_tree_attention, PreTrainedModel.set_attn_implementation)
"""`with tree_attention_of(model):` lets the model use beagle_tree inside the block; its own choice comes back when the
last thread has left."""
