"""`attn_implementation="beagle_tree"`: the target's attention over a fixed cache, with its tree mask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from beagle_kernels import tree_attention

NAME = "beagle_tree"
_RAGGED_ROWS = 4
"""Rows from which reading only what each row sees beats one padded call."""


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
        raise ValueError("beagle_tree needs the 4-D mask that the decoding loop gives it")
    if query.shape[2] == 1 and len(query) >= _RAGGED_ROWS and query.device.type == "cpu":
        return _ragged_attention(query, key, value, attention_mask, scaling), None
    return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _ragged_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One new token a row, which sees its row's slots from the first to its own: reads those, not the longest row's.

    As in grouped_attention, but returns [B, 1, Hq, D].
    """
    lengths = (mask[:, 0, 0].sum(-1) - 1).to(torch.int32)
    own = torch.ones(len(query), 1, 1, dtype=torch.int64)
    return tree_attention(query.transpose(1, 2), key, value, lengths, own, scale=scale)


AttentionInterface.register(NAME, _beagle_tree)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


_lock = threading.Lock()
_in_use: WeakKeyDictionary[PreTrainedModel, tuple[str, int]] = WeakKeyDictionary()


@contextmanager
def tree_attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use beagle_tree inside the block; its own choice comes back when the last thread has left."""
    with _lock:
        before, users = _in_use.get(model, (model.config._attn_implementation, 0))
        if not users:
            model.set_attn_implementation(NAME)
        _in_use[model] = before, users + 1
    try:
        yield
    finally:
        with _lock:
            before, users = _in_use.pop(model)
            if users > 1:
                _in_use[model] = before, users - 1
            else:
                model.set_attn_implementation(before)
