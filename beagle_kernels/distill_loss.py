"""Distillation loss: match the target's distribution and hidden state, without ever holding the logits.

With student and teacher hidden states s_i, t_i, the frozen head W, p_i = softmax(W t_i), z_i = W s_i, row weights w_i:

    loss = sum_i w_i (logsumexp z_i - p_i . z_i + regression / d sum_c SmoothL1(s_ic - t_ic))
    d loss / d s_i = w_i (W' (softmax z_i - p_i) + regression / d clamp(s_i - t_i, -1, 1))

As the head is frozen the gradient needs nothing from above but a factor, so it is computed along with the loss, in
chunks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import accumulation


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    regression: float = 10.0,
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum over rows of soft cross-entropy plus regression (paper section 3.3; docs/design.md: Training).

    student, teacher [T, d] hidden states that `weight` [V, d], the frozen LM head, maps to logits, all of one dtype;
    row_weight float32 [T] (float64 for float64 inputs): rows of weight 0 cost nothing and may hold anything.
    Returns a scalar, float32 (float64 for float64 inputs), not divided by any weight. The gradient reaches the
    student only. In an autocast region student, teacher and weight are cast as `torch.nn.functional.linear` casts.
    tf32: on a GPU, multiply float32 inputs in TF32, else exactly; torch's own setting is put aside meanwhile.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "distill_loss"
    kind = student.device.type
    if torch.is_autocast_enabled(kind) and student.dtype != torch.float64:
        student, teacher, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (student, teacher, weight))
    checks.tensor(op, "student", student, (None, None), checks.FLOATS)
    checks.tensor(op, "teacher", teacher, student.shape, (student.dtype,))
    checks.tensor(op, "weight", weight, (None, student.shape[1]), (student.dtype,))
    checks.tensor(op, "row_weight", row_weight, student.shape[:1], (accumulation(student.dtype),))
    if weight.numel() < 1:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}; allowed: at least one token of width 1 or more")
    checks.same_device(op, student=student, teacher=teacher, weight=weight, row_weight=row_weight)
    gradient = torch.is_grad_enabled() and student.requires_grad
    args = student, teacher.detach(), weight.detach(), row_weight.detach(), float(regression), gradient, tf32, backend
    return torch.ops.beagle.distill_loss(*args)[0]


@backends.operator("distill_loss", tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    regression: float,
    gradient: bool,
    tf32: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss and, where `gradient` asks for it, its gradient in the student (else an empty tensor). No graph can
    hold it: it asks the device how many rows have a weight."""
    args = student, teacher, weight, row_weight, regression, gradient, tf32
    with torch.autocast(student.device.type, enabled=False):
        return backends.call("distill_loss", backend, student.device, *args)


@_op.register_fake
def _(student, teacher, weight, row_weight, regression, gradient, tf32=False, backend="auto"):
    loss = student.new_empty((), dtype=accumulation(student.dtype))
    return loss, student.new_empty(student.shape if gradient else (0,))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_loss: Tensor, _: Tensor):
    (grad,) = ctx.saved_tensors
    return (grad_loss * grad).to(grad.dtype), None, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
