"""Tree attention: the nodes of a draft tree see the whole prefix and, of the tree, what their bits name.

Row b's cache holds its prefix in slots 0 .. lengths[b] - 1 and its tree in the slots after it. Node n sees slot s if

    (s < lengths[b], or bit s - lengths[b] of mask[b, n] is set) and s >= starts[b, n]

and out_n = softmax_s(scale q_n . k_s) v over those. What models add to it:

    a window (starts)    slots below the node's start are not visible
    a soft cap c         scores are z_s = c tanh(scale q_n . k_s / c)
    sinks                out_n = sum_s exp(z_s) v_s / (sum_s exp(z_s) + exp(sink of the head))

Slots that no node sees are never used, and those below all starts cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of draft-tree nodes to a cache that holds the prefix and the tree (docs/design.md: The tree).

    q [B, N, Hq, D]; k [B, Hkv, S, D] and v [B, Hkv, S, Dv], in q's dtype, or, with block_table int32 [B, max_pages],
    pages [P, Hkv, page, D] and [P, Hkv, page, Dv] of which row b's slot s is in page block_table[b, s // page]; lengths
    int32 [B], the prefix; mask int64 [B, N, W]: slot lengths[b] + j is visible if bit j % 64 of word j // 64 is set;
    scale defaults to D ** -0.5. Bits of slots past the cache are ignored, and so are a row's pages that its nodes see
    nothing of (any id may stand there). Returns out [B, N, Hq, Dv] in q's dtype, 0 for a node that sees nothing. Not
    differentiable.

    starts int32 [B, N]: the first slot that the node may see, of the prefix and of the tree; below 0 it is 0, past
    everything the node sees nothing. sinks float32 [Hq]: one more logit a head in the softmax's denominator, without
    a value, neither scaled nor capped; -inf is none, +inf leaves 0, NaN leaves NaN where a node sees anything.
    softcap: a number from 1e-30 to 1e30.

    Raises ValueError or TypeError for shapes, dtypes, devices or a softcap that do not fit.
    """
    op = "tree_attention"
    checks.tensor(op, "q", q, (None, None, None, None), checks.FLOATS)
    dtypes, (batch, nodes, heads, width) = (q.dtype,), q.shape
    checks.tensor(op, "k", k, (None if block_table is not None else batch, None, None, width), dtypes)
    keys = k.shape
    # most often as wide as the keys, which is compared at once
    checks.tensor(op, "v", v, keys if v.shape == keys else (*keys[:3], None), dtypes)
    checks.heads(op, heads, keys[1], width)
    checks.at_least(op, "the values' head size", v.shape[3], 1)
    checks.tensor(op, "lengths", lengths, (batch,), checks.INT32)
    checks.tensor(op, "mask", mask, (batch, nodes, None), checks.INT64)
    if block_table is not None:
        checks.tensor(op, "block_table", block_table, (batch, None), checks.INT32)
        if keys[0] < 1 or keys[2] < 1:
            raise ValueError(f"{op}: k holds {keys[0]} pages of {keys[2]} slots; allowed: 1 or more of each")
    if mask.shape[2] < 1:
        raise ValueError(f"{op}: mask has shape {list(mask.shape)}; allowed: at least one word a node")
    checks.same_device(op, q=q, k=k, v=v, lengths=lengths, mask=mask, block_table=block_table)
    if starts is not None:
        checks.tensor(op, "starts", starts, (batch, nodes), checks.INT32)
        checks.same_device(op, q=q, starts=starts)
    if sinks is not None:
        checks.tensor(op, "sinks", sinks, (heads,), checks.FLOAT32)
        checks.same_device(op, q=q, sinks=sinks)
    if softcap is not None:
        if not 1e-30 <= softcap <= 1e30:
            raise ValueError(f"{op}: softcap is {softcap}; allowed: 1e-30 to 1e30, or None for no cap")
        softcap = float(softcap)
    scale = width**-0.5 if scale is None else float(scale)
    return torch.ops.beagle.tree_attention(q, k, v, lengths, mask, block_table, scale, starts, sinks, softcap, backend)


@backends.operator("tree_attention")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    given = q, k, v, lengths, mask, block_table, scale, starts, sinks, softcap
    return backends.call("tree_attention", backend, q.device, *given)


@_op.register_fake
def _(q, k, v, lengths, mask, block_table, scale, starts=None, sinks=None, softcap=None, backend="auto"):
    return q.new_empty(*q.shape[:3], v.shape[3])
