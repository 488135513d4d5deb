"""The definition of `distill_loss` and of its gradient, a chunk of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import implementation
from ..types import accumulation

CHUNK = 64
"""Rows whose logits exist at one time."""


@implementation("distill_loss", "reference")
def distill_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    regression: float,
    gradient: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    acc = accumulation(student.dtype)
    head = weight.to(acc)
    loss = torch.zeros((), dtype=acc, device=student.device)
    grad = torch.zeros(student.shape if gradient else (0,), dtype=student.dtype, device=student.device)
    for rows in row_weight.nonzero().squeeze(-1).split(CHUNK):
        s, t, w = student[rows].to(acc), teacher[rows].to(acc), row_weight[rows].to(acc)[:, None]
        logits, target = s @ head.T, torch.softmax(t @ head.T, -1)
        cross_entropy = -(target * torch.log_softmax(logits, -1)).sum(-1)
        distance = F.smooth_l1_loss(s, t, reduction="none").mean(-1)
        loss += (w[:, 0] * (cross_entropy + regression * distance)).sum()
        if gradient:
            through_head = (torch.softmax(logits, -1) - target) @ head
            grad[rows] = (w * (through_head + regression / s.shape[-1] * (s - t).clamp(-1, 1))).to(grad.dtype)
    return loss, grad
