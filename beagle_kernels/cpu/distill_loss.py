"""`distill_loss` on the CPU: chunks of rows whose logits stay within a byte budget, everything in place.

Student and teacher rows go through the head in one product, which reads it once for both; the student's
probabilities become the logit gradient where they stand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import implementation
from ..types import accumulation

BUDGET = 16 << 20
"""Bytes of logits that exist at one time: what a processor's caches hold."""


@implementation("distill_loss", "cpu")
def distill_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    regression: float,
    gradient: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    acc, width = accumulation(student.dtype), student.shape[1]
    # of the products: processors have instructions for bf16, few for fp16
    kind = torch.bfloat16 if student.dtype == torch.bfloat16 else acc
    head = weight.to(kind)
    used = row_weight.nonzero().squeeze(-1)
    chunk = max(1, min(BUDGET // (2 * weight.shape[0] * acc.itemsize), used.numel()))
    products = torch.empty(2 * chunk, weight.shape[0], dtype=kind)
    logits = products if kind == acc else torch.empty(products.shape, dtype=acc)
    loss = torch.zeros((), dtype=acc)
    grad = torch.zeros(student.shape if gradient else (0,), dtype=student.dtype)
    for rows in used.split(chunk):
        states = torch.cat([student[rows], teacher[rows]]).to(kind)
        w = row_weight[rows, None]
        both = torch.mm(states, head.T, out=products[: 2 * len(rows)])
        z, target = (both if kind == acc else logits[: len(both)].copy_(both)).tensor_split(2)
        torch.softmax(target, -1, out=target)
        cross_entropy = -torch.bmm(target[:, None], z[:, :, None])[..., 0]
        top, at = z.max(-1, keepdim=True)
        torch.softmax(z, -1, out=z)
        cross_entropy += top - z.gather(-1, at).log()
        s, t = states.to(acc).tensor_split(2)
        loss += (w * (cross_entropy + regression * F.smooth_l1_loss(s, t, reduction="none").mean(-1, True))).sum()
        if gradient:
            through_head = z.sub_(target).to(kind) @ head
            grad[rows] = (w * (through_head + regression / width * (s - t).clamp_(-1, 1))).to(grad.dtype)
    return loss, grad
