"""AdamW, or Muon for the matrices with AdamW for the rest, stepped and saved as one."""

from __future__ import annotations

import torch
from torch import nn

from beagle_sd.training.config import TrainingConfig


class Optimizer:
    """What a run's config asks for. Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the
    momentum, scaled as an AdamW step is, so that the same learning rate serves both."""

    def __init__(self, draft: nn.Module, config: TrainingConfig):
        matrices = [weight for weight in draft.parameters() if weight.ndim == 2 and config.optimizer == "muon"]
        others = [weight for weight in draft.parameters() if weight.ndim != 2 or config.optimizer != "muon"]
        lr, decay = config.lr, config.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
        ]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float) -> None:
        """One step at this learning rate; the gradients are dropped."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
