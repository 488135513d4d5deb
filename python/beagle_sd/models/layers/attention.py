"""`attn_implementation="beagle_tree"`: the target's attention over a fixed cache, its tree mask as words or 4-D."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from beagle_kernels import tree_attention
from beagle_kernels.reference.tree_attention import gather_pages
from beagle_sd.models.head import UnsupportedTarget

if TYPE_CHECKING:
    from beagle_sd.models.cache import TreeCache

NAME = "beagle_tree"
_MEANINGLESS = {"position_ids", "cache_position", "use_cache", "layer_idx", "is_causal", "return_dict"}
"""What models hand on beside the mask that says nothing on which keys a query sees, or says what the mask does."""
_FEW_NODES = 64
"""New tokens up to which a row's attention reads just what the row sees, by mask words: beyond, as in a prompt on a
CPU, SDPA's products over a padded 4-D mask are faster."""
WIDEST = 256
"""Of heads that tree_attention takes on a GPU."""
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


def cache_being_read() -> TreeCache | None:
    """That of the `reading` around the call."""
    return getattr(_reading, "cache", None)


class Span(NamedTuple):
    """How far back a layer's queries see: `window` positions that end with their own, or those of their own stretch of
    `chunk`; None, None: all."""

    window: int | None = None
    chunk: int | None = None


class Attended(NamedTuple):
    """How a module called its attention: with which scale and soft cap, and what it gave that a layer's fused op does
    not do, if anything."""

    scale: float
    softcap: float | None
    unlike: str | None


class Seen(NamedTuple):
    """What new tokens see of a layer: mask words [B, N, W] int64 and, below a window or chunk nothing, `starts` [B, N]
    int32, the first slots that they see (None: the first of all)."""

    words: Tensor
    starts: Tensor | None


def seen(words: Tensor, lengths: Tensor, depth: Tensor, span: Span) -> Seen:
    """What is left of words [B, N, W] where N new tokens at `depth` [B, N] behind lengths [B] see no further than
    `span`.

    New token j lies in slot lengths + j, at position lengths + depth[j], which is no later: slots tell what is too far
    back among those before, and bits among the new ones.
    """
    window, chunk = span
    if window is None and chunk is None:
        return Seen(words, None)
    position = lengths.long()[:, None] + depth
    first = position - window + 1 if chunk is None else position // chunk * chunk  # type: ignore[operator]
    count = words.shape[1]
    if window is None or window < count:
        words = words & packed(position[:, None] >= first[:, :, None], words.shape[2])
    return Seen(words, first.clamp(min=0).to(torch.int32))


def packed(bits: Tensor, words: int) -> Tensor:
    """bool [B, N, M] as words [B, N, words] int64: bit b of word w is column 64 w + b."""
    wide = F.pad(bits, (0, 64 * words - bits.shape[2])).unflatten(2, (words, 64)).long()
    return (wide << torch.arange(64, device=bits.device)).sum(3)


def visible_keys(lengths: Tensor, mask: Tensor, limit: int, starts: Tensor | None = None) -> Tensor:
    """The 4-D mask [B, 1, N, limit] of N new tokens: every slot below lengths[b], then by mask words [B, N, W]; none
    below starts [B, N]."""
    count = mask.shape[1]
    node = torch.arange(count, device=mask.device)
    among = (mask[:, :, node // 64] >> (node % 64) & 1).bool()
    slots = torch.arange(limit, device=lengths.device)
    lengths = lengths.long()[:, None]
    new = (slots - lengths).clamp(0, count - 1)
    new = torch.gather(among, 2, new[:, None].expand(-1, count, -1))
    inside = (slots >= lengths) & (slots < lengths + count)
    visible = (slots < lengths)[:, None] | (new & inside[:, None])
    if starts is not None:
        visible &= slots >= starts[:, :, None]
    return visible[:, None]


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention that reads each key head once: the query heads that share it are stacked as queries.

    query [B, Hq, N, D]; key [B, Hkv, L, D]; value [B, Hkv, L, Dv]; mask [B, 1, N, L], bool or additive. Returns
    [B, Hq, N, Dv].
    """
    batch, heads, count, width = query.shape
    group = heads // key.shape[1]
    stacked = query.reshape(batch, key.shape[1], group * count, width)
    if mask is not None and group > 1:
        mask = mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scale)
    return out.view(batch, heads, count, value.shape[3])


def _beagle_tree(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    cache = cache_being_read()
    _check(module, query, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None:
        unlike = "its attention has sinks" if s_aux is not None else _own_scaling(module)
        cache.attended[id(module)] = Attended(scale, softcap or None, unlike)
    if cache is None or attention_mask is None or attention_mask.dtype != torch.int64:
        return grouped_attention(query, key, value, attention_mask, scale).transpose(1, 2), None
    query = _tempered(module, query, cache)
    span = cache.span_of(getattr(module, "layer_idx", None), sliding_window)
    words, starts = cache.once(("seen", span), lambda: seen(attention_mask[:, 0], cache.lengths, cache.depth, span))
    softcap = softcap or None
    many = query.shape[2] > _FEW_NODES and not cache.fixed
    if softcap is None and s_aux is None and (many or _too_wide(key, value)):
        if (table := cache.table(span)) is not None:
            key, value = gather_pages(key, table), gather_pages(value, table)
        first = 0 if starts is None or cache.fixed else int(starts.min())
        mask = cache.once(("4-D", span), lambda: visible_keys(cache.lengths, words, key.shape[2], starts))
        if len(query) > 1 or cache.fixed:  # slots that nobody sees may hold anything, and 0 times NaN is none
            hidden = cache.once(("hidden", span), lambda: ~mask.any(2)[..., None])
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        out = grouped_attention(query, key[:, :, first:], value[:, :, first:], mask[..., first:], scale)
        return out.transpose(1, 2), None
    extra = {"starts": starts, "softcap": softcap, "sinks": None if s_aux is None else s_aux.flatten().float()}
    return tree_attention(
        query.transpose(1, 2),
        key,
        value,
        cache.lengths,
        words,
        scale=scale,
        block_table=cache.table(span),
        **{name: value for name, value in extra.items() if value is not None},
    ), None


def _too_wide(key: Tensor, value: Tensor) -> bool:
    """Whether heads are wider than tree_attention takes on a GPU, as Gemma 4's of 512 are: these go through SDPA and a
    mask over the whole cache."""
    return key.is_cuda and max(key.shape[3], value.shape[3]) > WIDEST


def _check(module, query: Tensor, mask: Tensor | None, unknown: dict) -> None:
    if names := sorted(name for name, value in unknown.items() if _means_something(name, value)):
        raise UnsupportedTarget(
            f"{type(module).__name__} gives its attention {', '.join(names)}; allowed: a softmax over the keys that "
            "its mask lets through, with a window, a soft-cap or sinks, and nothing else"
        )
    if mask is None and query.shape[2] > 1:
        raise UnsupportedTarget(
            f"{type(module).__name__} does not hand its mask on to the attention; allowed: attention by the mask given"
        )


def _means_something(name: str, value) -> bool:
    return not (value is None or name in _MEANINGLESS or name.startswith("output_"))


def tempered_by_position(module) -> bool:
    """Whether the module scales its queries by positions that it counts from the cache's length, as Llama 4's layers
    without rotary positions do: tokens of a tree, and rows of different lengths, are at others."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and hasattr(module, "floor_scale")


def _own_scaling(module) -> str | None:
    config = getattr(module, "config", None)
    if not hasattr(module, "floor_scale") or not getattr(config, "attn_temperature_tuning", False) or module.use_rope:
        return None
    return "its queries are scaled by their positions"


def _tempered(module, query: Tensor, cache: TreeCache) -> Tensor:
    """The queries scaled by their own positions, where view.py has switched the module's own scaling off."""
    if _own_scaling(module) is None:
        return query
    position = cache.lengths.long()[:, None] + cache.depth
    tuning = torch.log1p(torch.floor((position.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
    return (query * tuning[:, None, :, None]).to(query.dtype)


AttentionInterface.register(NAME, _beagle_tree)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
