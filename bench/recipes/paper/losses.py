"""Other losses and weights than the trainer's own, for the comparison of objectives: plain PyTorch, in chunks of rows.

They take the arguments of `beagle_kernels.distill_loss` and `beagle_sd.training.objective.row_weights`. With p the
target's distribution over the draft's vocabulary and q the draft's, `overlap` is sum(min(p, q)): the probability that
rejection sampling accepts (arXiv 2211.17192), and 1 less the total variation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle_kernels import distill_loss
from beagle_sd.data.batch import Batch
from beagle_sd.training.objective import row_weights

_ROWS = 256
_HYBRID = 3.0
"""How fast the hybrid turns from cross-entropy to total variation as the overlap grows."""
REACHED = 0.6
"""Of the rounds that reach a position of the window, those that reach the next: the bundled draft's, 16 nodes."""


def total_variation(log_q: Tensor, p: Tensor) -> Tensor:
    return 1 - overlap(log_q, p)


def acceptance(log_q: Tensor, p: Tensor) -> Tensor:
    """Negative logarithm of the overlap."""
    return -overlap(log_q, p).clamp(min=1e-6).log()


def hybrid(log_q: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy where the overlap is small, total variation where it is large."""
    shared = overlap(log_q, p)
    share = torch.exp(-_HYBRID * shared.detach())
    return share * -(p * log_q).sum(-1) + (1 - share) * (1 - shared)


def overlap(log_q: Tensor, p: Tensor) -> Tensor:
    return torch.minimum(log_q.exp(), p).sum(-1)


def of_rows(
    each: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    regression: float,
    tf32: bool,
) -> Tensor:
    """Sum over rows of row_weight * (each(log q, p) + regression * SmoothL1), as `distill_loss` has it; f32 scalar."""
    total = torch.zeros((), device=student.device)
    for rows in row_weight.nonzero().squeeze(-1).split(_ROWS):
        state, wanted = student[rows], teacher[rows]
        log_q, p = (state @ weight.T).float().log_softmax(-1), (wanted @ weight.T).float().softmax(-1)
        distance = F.smooth_l1_loss(state.float(), wanted.float(), reduction="none").mean(-1)
        total = total + (row_weight[rows] * (each(log_q, p) + regression * distance)).sum()
    return total


def reached(batch: Batch, window: int, offset: Tensor, *, simulated: bool) -> Tensor:
    """In simulation, row m of a window counts as often as rounds reach it, instead of window - m."""
    counted = row_weights(batch, window, offset, simulated=False)
    if not simulated:
        return counted
    first = offset.long().index_select(0, batch.sequence)
    return counted * REACHED ** ((batch.positions - first) % window).float()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": distill_loss,
    "total variation": partial(of_rows, total_variation),
    "acceptance": partial(of_rows, acceptance),
    "hybrid": partial(of_rows, hybrid),
}
WEIGHTS: dict[str, Callable[..., Tensor]] = {"passes": row_weights, "reached": reached}
