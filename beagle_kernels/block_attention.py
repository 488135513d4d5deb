"""Block attention: every query of a window sees the keys before the window, and nothing else.

Positions i of a sequence fall into windows of `window` positions that start at s(i) = offset + w window. With
scores S_ij = scale q_i . k_j,

    lse_i = log sum_{j < s(i)} exp S_ij        out_i = sum_{j < s(i)} exp(S_ij - lse_i) v_j

and, with g and h the gradients of out and lse and P_ij = exp(S_ij - lse_i),

    dS_ij = P_ij (g_i . v_j - g_i . out_i + h_i)        dQ = scale dS K, dK = scale dS' Q, dV = P' g

A position before the first window, or in a window that starts its sequence, sees no key. With a `reach` the sums
begin at max(0, i - reach): a sliding window over the text, and a cost that is linear in its length. A row further than
reach - 1 into its window then sees no key either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import accumulation


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    offset: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    reach: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention to the true keys before each query's window (paper section 3.2; docs/design.md: Training).

    q [T, Hq, D]; k, v [T, Hkv, D] of one dtype, Hkv dividing Hq; offset int32 [num_seqs], the position of each
    sequence's first window; cu_seqlens int32 [num_seqs + 1], ascending row bounds of the packed sequences (None:
    one sequence of T rows; a bound outside 0 .. T counts as the nearer of the two); scale defaults to D ** -0.5;
    reach: row i sees no key before i - reach (None: no limit). What lies out of every reach costs nothing.
    Returns out [T, Hq, D] in q's dtype and lse [T, Hq] in float32 (float64 for float64 inputs). A row without a key,
    or outside every sequence, gives 0 and -inf and no gradient. Both outputs are differentiable in q, k and v.

    Raises ValueError or TypeError for shapes, dtypes, devices, a window or a reach that do not fit.
    """
    op = "block_attention"
    checks.tensor(op, "q", q, (None, None, None), checks.FLOATS)
    checks.tensor(op, "k", k, (q.shape[0], None, q.shape[2]), (q.dtype,))
    checks.tensor(op, "v", v, k.shape, (q.dtype,))
    checks.heads(op, q.shape[1], k.shape[1], q.shape[-1])
    checks.tensor(op, "offset", offset, (1 if cu_seqlens is None else None,), (torch.int32,))
    if cu_seqlens is not None:
        checks.tensor(op, "cu_seqlens", cu_seqlens, (offset.shape[0] + 1,), (torch.int32,))
    checks.at_least(op, "window", window, 1, 2**63 - 1)
    if reach is not None:
        checks.at_least(op, "reach", reach, 1, 2**63 - 1, ", or None for no limit")
    checks.same_device(op, q=q, k=k, v=v, offset=offset, cu_seqlens=cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.beagle.block_attention(q, k, v, offset, cu_seqlens, window, scale, reach, backend)


@backends.operator("block_attention")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return backends.call("block_attention", backend, q.device, q, k, v, offset, cu_seqlens, window, scale, reach)


@backends.operator("block_attention_backward")
def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    args = grad_out, grad_lse, q, k, v, out, lse, offset, cu_seqlens, window, scale, reach
    return backends.call("block_attention_backward", backend, q.device, *args)


@_op.register_fake
def _(q, k, v, offset, cu_seqlens, window, scale, reach, backend="auto"):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation(q.dtype))


@_backward_op.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, offset, cu_seqlens, window, scale, reach, backend="auto"):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, offset, cu_seqlens, ctx.window, ctx.scale, ctx.reach, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, offset, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    q, k, v, out, lse, offset, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = grad_out, grad_lse, q, k, v, out, lse, offset, cu_seqlens, ctx.window, ctx.scale, ctx.reach, ctx.backend
    return *torch.ops.beagle.block_attention_backward(*args), *(None,) * 6


_op.register_autograd(_backward, setup_context=_setup_context)
