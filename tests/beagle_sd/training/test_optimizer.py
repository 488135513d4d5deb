"""The optimizers a run may ask for."""

from __future__ import annotations

from dataclasses import replace

import torch
from models import small_draft, small_target
from training_cases import CONFIG

from beagle_sd.training.optimizer import Optimizer


def stepped(name: str, weight_decay: float = 0.0):
    """A draft before and after one step with random gradients, and those."""
    draft = small_draft(small_target())
    optimizer = Optimizer(draft, replace(CONFIG, optimizer=name, weight_decay=weight_decay))
    before = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
    torch.manual_seed(0)
    gradients = {name: torch.randn_like(weight) for name, weight in draft.named_parameters()}
    for name, weight in draft.named_parameters():
        weight.grad = gradients[name]
    optimizer.step(1e-2)
    assert all(weight.grad is None for weight in draft.parameters())
    return before, dict(draft.named_parameters()), gradients


def test_adamw_steps_by_the_signs_at_first():
    before, after, gradients = stepped("adamw")
    for name, weight in after.items():
        torch.testing.assert_close(before[name] - weight, 1e-2 * gradients[name].sign(), rtol=1e-3, atol=1e-5)


def test_muon_steps_orthogonally_by_as_much_and_leaves_the_norms_to_adamw():
    before, after, gradients = stepped("muon")
    for name, weight in after.items():
        step = (before[name] - weight.detach()) / 1e-2
        if weight.ndim == 1:
            torch.testing.assert_close(step, gradients[name].sign(), rtol=1e-3, atol=1e-5)
            continue
        # Newton-Schulz in bf16 brings the singular values near 1, but the smallest ones, of square matrices
        values = torch.linalg.svdvals(step) / (0.2 * max(weight.shape) ** 0.5)
        assert 0.6 < values.quantile(0.1) and values.max() < 1.3, (name, values)
        assert (step * gradients[name]).sum() > 0


def test_weight_decay_acts_on_all_weights():
    for name in ("adamw", "muon"):
        without, with_decay = stepped(name)[1], stepped(name, weight_decay=0.5)
        for weight, kept in with_decay[1].items():
            drop = 1e-2 * 0.5 * with_decay[0][weight]
            torch.testing.assert_close(kept, without[weight] - drop, rtol=1e-4, atol=1e-6)
