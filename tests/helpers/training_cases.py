"""A small run of the trainer, for tests of it and of what it trains."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import small_draft, small_target

from beagle_sd import BeagleDraft
from beagle_sd.data.dataset import StateDataset
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.trainer import Trainer

CONFIG = TrainingConfig(
    window=4,
    steps=3,
    block_epochs=3.0,
    simulation_epochs=2.0,
    tokens_per_step=120,
    lr=1e-2,
    warmup_steps=3,
    schedule="cosine",
    noise=0.05,
    held_out=6,
    eval_steps=7,
    save_steps=4,
    seed=3,
)


def trainer_of(data: Path, folder: Path, config: TrainingConfig = CONFIG, **draft) -> Trainer:
    return Trainer(small_draft(small_target(), **draft), StateDataset(data, held_out=config.held_out), folder, config)


def metrics_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines


class Stop(Exception):
    """Raised from the progress callback, as Ctrl-C would be."""


def weights_of(folder: Path) -> dict:
    return BeagleDraft.from_pretrained(folder / "final").state_dict()


def assert_same_run(folder: Path, whole) -> None:
    assert metrics_of(folder) == metrics_of(whole[1])
    assert all(torch.equal(weight, weights_of(whole[1])[name]) for name, weight in weights_of(folder).items())
