"""Extend attention: a few more keys, each row's own, merged into an attention already computed.

With the old result (out, lse) of a row and its extra scores s_j = scale q . k_j, j < m,

    lse' = log(exp lse + sum_j exp s_j)        out' = exp(lse - lse') out + sum_j exp(s_j - lse') v_j

which is exact: the old keys enter as one key of score lse and value out, and so do their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import accumulation


def extend_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge each row's own m extra keys into its attention (docs/design.md: Training).

    out, q [R, Hq, D]; lse [R, Hq] float32 (float64 for float64 inputs), -inf where the row had no key, whose out is
    then ignored; k, v [R, m, Hkv, D], m >= 0, Hkv dividing Hq; scale defaults to D ** -0.5. Returns the merged out
    and lse, of the dtypes given. Differentiable in all five.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "extend_attention"
    checks.tensor(op, "q", q, (None, None, None), checks.FLOATS)
    checks.tensor(op, "out", out, q.shape, (q.dtype,))
    checks.tensor(op, "lse", lse, q.shape[:2], (accumulation(q.dtype),))
    checks.tensor(op, "k", k, (q.shape[0], None, None, q.shape[2]), (q.dtype,))
    checks.tensor(op, "v", v, k.shape, (q.dtype,))
    checks.heads(op, q.shape[1], k.shape[2], q.shape[-1])
    checks.same_device(op, out=out, lse=lse, q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.beagle.extend_attention(out, lse, q, k, v, scale, backend)


@backends.operator("extend_attention")
def _op(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return backends.call("extend_attention", backend, q.device, out, lse, q, k, v, scale)


@backends.operator("extend_attention_backward")
def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = grad_out, grad_lse, out, lse, q, k, v, scale
    return backends.call("extend_attention_backward", backend, q.device, *args)


@_op.register_fake
def _(out, lse, q, k, v, scale, backend="auto"):
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


@_backward_op.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, scale, backend="auto"):
    return tuple(x.new_empty(x.shape) for x in (out, lse, q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    out, lse, q, k, v = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = grad_out, grad_lse, out, lse, q, k, v, ctx.scale, ctx.backend
    return *torch.ops.beagle.extend_attention_backward(*args), None, None


_op.register_autograd(_backward, setup_context=_setup_context)
