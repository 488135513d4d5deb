"""All settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a run; the defaults are the paper's, for a 7B target. Small targets want a higher lr.

    Each field's metadata holds a sentence on it, which the command line shows. ValueError names a setting out of range.
    """

    window: int = _setting(5, "Positions of a window in stage 1, block attention; 1 is plain next-token training.")
    steps: int = _setting(4, "Simulated steps of a window in stage 2.")
    block_epochs: float = _setting(10.0, "Epochs of stage 1; may be a fraction.")
    simulation_epochs: float = _setting(10.0, "Epochs of stage 2; may be a fraction.")
    tokens_per_step: int = _setting(32768, "Tokens a step, over all processes.")
    micro_batches: int = _setting(1, "Parts, one after the other, in which a process does its share of a step.")
    context: int = _setting(2048, "Longest sequence, in tokens.")
    lr: float = _setting(3e-5, "Learning rate; the paper's is for 7B, small targets want 1e-3.")
    schedule: str = _setting("constant", "constant, or cosine to a tenth, after warm-up.")
    warmup_steps: int = _setting(2000, "Steps of linear warm-up.")
    optimizer: str = _setting("adamw", "adamw, or muon for the matrices: fewer tokens to the same draft.")
    betas: tuple[float, float] = _setting((0.9, 0.95), "AdamW's.")
    weight_decay: float = _setting(0.0, "Of all weights.")
    clip: float = _setting(0.5, "Largest norm of all gradients together.")
    regression: float = _setting(10.0, "Weight of the hidden-state regression.")
    noise: float = _setting(0.0, "Standard deviation of Gaussian noise on the states that give the keys.")
    detach_states: bool = _setting(False, "Let no gradient pass through the draft states of stage 2.")
    autocast: bool = _setting(False, "Matrix products in bf16.")
    held_out: int = _setting(50, "Keep every so-manyth sequence for evaluation; 0 keeps none.")
    eval_steps: int = _setting(500, "Steps between evaluations.")
    eval_tokens: int = _setting(16384, "Held-out tokens of an evaluation.")
    save_steps: int = _setting(500, "Steps between checkpoints.")
    seed: int = _setting(0, "Seed of the start, of the data's order and of the windows.")

    def __post_init__(self):
        for name in ("window", "steps", "tokens_per_step", "micro_batches", "context", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        for name in ("block_epochs", "simulation_epochs", "lr", "warmup_steps", "regression", "noise", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more")
        for name, allowed in (("schedule", ("constant", "cosine")), ("optimizer", ("adamw", "muon"))):
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed: {', '.join(map(repr, allowed))}")

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of the step after `step` have been done."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
