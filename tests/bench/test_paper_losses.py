"""The losses and weights of the comparison against their definitions, row by row."""

from __future__ import annotations

import pytest
import torch

from beagle_kernels import distill_loss
from beagle_sd.data.batch import Batch
from bench.recipes.paper import losses

T, D, V = 300, 16, 40  # more rows than a chunk has


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(n, D, generator=generator) for n in (T, T, V))
    row_weight = torch.randint(0, 3, (T,), generator=generator).float()
    return student.requires_grad_(), teacher, weight, row_weight


def by_hand(name, student, teacher, weight, row_weight, regression):
    total = 0.0
    for s, t, w in zip(student.double(), teacher.double(), row_weight.tolist()):
        p, q = torch.softmax(weight.double() @ t, 0), torch.softmax(weight.double() @ s, 0)
        shared = sum(min(a, b) for a, b in zip(p, q))
        entropy = -(p * q.log()).sum()
        share = torch.exp(-3.0 * shared.detach())
        value = {
            "cross-entropy": entropy,
            "total variation": (p - q).abs().sum() / 2,
            "acceptance": -shared.log(),
            "hybrid": share * entropy + (1 - share) * (1 - shared),
        }[name]
        total = total + w * (value + regression * torch.nn.functional.smooth_l1_loss(s, t))
    return total


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_and_its_gradient(name, rows):
    student, *rest = rows
    found = losses.LOSSES[name](student, *rest, regression=2.0, tf32=True)
    wanted = by_hand(name, student, *rest, 2.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_cross_entropy_is_that_of_the_trainer():
    assert losses.LOSSES["cross-entropy"] is distill_loss


def test_weights_by_reach_fall_from_row_to_row_of_a_window():
    count = 11
    mask = torch.ones(count, dtype=torch.bool)
    batch = Batch(
        tokens=torch.zeros(count, dtype=torch.int64),
        states=torch.zeros(count, D),
        loss_mask=mask,
        positions=torch.arange(count),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
    )
    offset = torch.tensor([2], dtype=torch.int32)
    found = losses.reached(batch, 4, offset, simulated=True)
    wanted = [0, 0, *[losses.REACHED**m for m in (0, 1, 2, 3)] * 2, 1.0]
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert losses.reached(batch, 4, offset, simulated=False).tolist() == [0.0, 0.0, *[1.0] * 9]
