"""Liger's fused linear divergence: head and loss together, logits in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers import needs_gpu

NAME = "Liger fused linear JSD"


def why_not(device: str) -> str | None:
    return needs_gpu("liger_kernel", device)


def forward_kl() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss(student [T, d], teacher [T, d], weight [V, d]): the mean over rows of KL(teacher || student).

    The nearest of Liger's losses to distill_loss: its gradient is that of the soft cross-entropy with equal row
    weights 1 / T; there is no regression term and there are no row weights.
    """
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return fused(student, weight, teacher, weight, None)

    return loss
