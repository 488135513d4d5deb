"""The training runs behind the paper's figures, each done once and shared by all figures that need it.

A run of phase 1 starts from a fresh draft; one of phase 2 from the draft that a run of phase 1 left, with an optimizer
of its own. Both see the same tokens, so that all runs of a phase are equal in tokens and order of data, and but for
their own options in all settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from beagle_sd.data.dataset import StateDataset
from beagle_sd.data.shards import check_manifest
from beagle_sd.files import write_json
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import load_target
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.log import read_log
from beagle_sd.training.objective import draft_states
from beagle_sd.training.start import passing_start_on
from beagle_sd.training.trainer import Trainer
from bench.ops.bench_distill_loss import peak_memory
from bench.peers.eagle2 import EagleDraft, eagle_states
from bench.recipes.paper.losses import LOSSES, WEIGHTS
from bench.recipes.paper.replay import replay


@dataclass(frozen=True)
class Run:
    """window: positions a window has, in stage 1 or, if simulated, in stage 2; after: the run of phase 1 whose draft
    it starts from. A fresh Beagle draft has a key head for every query head unless it shares them as the target's do,
    and starts by `passing_start` unless at random. loss, weights: of `losses`; options: settings of the trainer, in
    place of those that all runs share."""

    window: int
    after: str | None = None
    simulated: bool = False
    append_states: bool = True
    head: str = "beagle"
    shared_keys: bool = False
    random: bool = False
    loss: str = "cross-entropy"
    weights: str = "passes"
    options: Mapping[str, Any] = field(default_factory=dict)


_FP32, _BF16 = {"autocast": False}, {"autocast": True}
_MUON = {"optimizer": "muon", "lr": 5e-3}
RUNS = {
    "next": Run(1),
    "block": Run(5),
    "eagle2": Run(1, head="eagle2"),
    "next-next": Run(1, after="next"),
    "block-block": Run(5, after="block"),
    "next-steps4": Run(4, after="next", simulated=True),
    "next-total-variation": Run(4, after="next", simulated=True, loss="total variation"),
    "next-acceptance": Run(4, after="next", simulated=True, loss="acceptance"),
    "next-hybrid": Run(4, after="next", simulated=True, loss="hybrid"),
    "next-reached": Run(4, after="next", simulated=True, weights="reached"),
    "fp32": Run(1, options=_FP32),
    "fp32-steps4": Run(4, after="fp32", simulated=True, options=_FP32),
    "bf16": Run(1, options=_BF16),
    "bf16-steps4": Run(4, after="bf16", simulated=True, options=_BF16),
    "muon": Run(1, options=_MUON),
    "muon-steps4": Run(4, after="muon", simulated=True, options=_MUON),
    "block-steps1": Run(1, after="block", simulated=True),
    "block-steps2": Run(2, after="block", simulated=True),
    "block-steps3": Run(3, after="block", simulated=True),
    "block-steps4": Run(4, after="block", simulated=True),
    "block-no-append": Run(4, after="block", simulated=True, append_states=False),
    "eagle2-eagle2": Run(1, after="eagle2", head="eagle2"),
    "shared": Run(5, shared_keys=True),
    "shared-steps4": Run(4, after="shared", simulated=True),
    "random-next": Run(1, shared_keys=True, random=True),
    "random-window2": Run(2, shared_keys=True, random=True),
    "random-window3": Run(3, shared_keys=True, random=True),
    "random-window4": Run(4, shared_keys=True, random=True),
    "random-block": Run(5, shared_keys=True, random=True),
    "random-next-next": Run(1, after="random-next"),
    "random-block-block": Run(5, after="random-block"),
    "random-block-steps4": Run(4, after="random-block", simulated=True),
}
HEADS: dict[str, tuple[type[BeagleDraft], Callable]] = {
    "beagle": (BeagleDraft, draft_states),
    "eagle2": (EagleDraft, eagle_states),
}
SHAPES = {"chain": (4, 1, 5), "tree": (4, 6, 16)}
"""depth, branch, num_nodes of the replays."""


@dataclass(frozen=True)
class Settings:
    """What all runs share. epochs: of each phase. The learning rate and regression weight are those that the bundled
    draft's card prefers for this target; the paper's are for a 7B one."""

    epochs: float = 1.0
    tokens_per_step: int = 2048
    lr: float = 2e-3
    warmup_steps: int = 20
    regression: float = 1.0
    draft_vocab: int = 4096
    held_out: int = 10
    eval_tokens: int = 16384
    autocast: bool = False

    def config(self, run: Run, seed: int, tokens: int) -> TrainingConfig:
        """A run's, evaluated about twice an epoch of `tokens`; the phases go through the data in different orders."""
        config = TrainingConfig(
            window=run.window,
            steps=run.window,
            block_epochs=0.0 if run.simulated else self.epochs,
            simulation_epochs=self.epochs if run.simulated else 0.0,
            tokens_per_step=self.tokens_per_step,
            lr=self.lr,
            schedule="cosine",
            warmup_steps=self.warmup_steps,
            regression=self.regression,
            held_out=self.held_out,
            eval_steps=max(1, tokens // self.tokens_per_step // 2),
            eval_tokens=self.eval_tokens,
            save_steps=20,
            autocast=self.autocast,
            seed=2 * seed + (run.after is not None),
        )
        return replace(config, **run.options)


class Runner:
    """Does runs that are not done yet in `work`, a folder a run; `states` is a folder of `beagle-sd prepare`."""

    def __init__(self, states: Path, work: Path, target: str, settings: Settings):
        self.states, self.work, self.settings = states, work, settings
        self.target, _ = load_target(target)
        config = self.target.config
        check_manifest(states, hidden_size=config.hidden_size, vocab_size=config.vocab_size)
        self.dataset = StateDataset(states, held_out=settings.held_out)
        self.tokens = self.dataset.tokens_of(self.dataset.train)
        self.vocab = self.dataset.frequent_tokens(min(settings.draft_vocab, config.vocab_size), config.vocab_size)

    def folder(self, name: str, seed: int) -> Path:
        return self.work / f"{name}-seed{seed}"

    def result(self, name: str, seed: int) -> dict:
        """A run's acceptance by depth over its course and tokens a round at its end; done if it is not yet."""
        folder = self.folder(name, seed)
        done = folder / "result.json"
        if not done.is_file():
            draft = self._trained(name, seed)
            found = {"run": name, "seed": seed, "settings": self._settings(name), "course": self._course(folder)}
            found["peak_bytes"] = self._peak_bytes(name, seed)
            for kind, shape in SHAPES.items():
                found[kind] = replay(draft, self.states, self.settings.held_out, *shape)
            write_json(done, found)
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["settings"] != (wanted := self._settings(name)):
            raise ValueError(
                f"{folder} was run with {found['settings']}, not {wanted}; "
                "use the same settings, or a new --work folder"
            )
        return found

    def _settings(self, name: str) -> dict:
        return asdict(self.settings) | asdict(RUNS[name])

    def _trained(self, name: str, seed: int) -> BeagleDraft:
        if (before := RUNS[name].after) is not None:
            self.result(before, seed)
        trainer = self._trainer(name, seed, self.folder(name, seed))

        def show(step: int, metrics: dict) -> None:
            if "acceptance_by_depth" in metrics:
                print(
                    f"{name}, seed {seed}, step {step} of {trainer.total_steps}: loss {metrics['loss']:.3f}, "
                    f"acceptance by depth {metrics['acceptance_by_depth']}",
                    flush=True,
                )

        trainer.run(show)
        return trainer.draft.eval()

    def _trainer(self, name: str, seed: int, folder: Path) -> Trainer:
        run = RUNS[name]
        return Trainer(
            self._start(run, seed),
            self.dataset,
            folder,
            self.settings.config(run, seed, self.tokens),
            states=HEADS[run.head][1],
            loss=LOSSES[run.loss],
            weights=WEIGHTS[run.weights],
        )

    def _peak_bytes(self, name: str, seed: int) -> int:
        """What a step allocates at its worst moment, beyond weights and moments, which a first step makes."""
        with TemporaryDirectory() as folder:
            trainer = self._trainer(name, seed, Path(folder))
            trainer.draft.train()
            trainer.train_step()
            return peak_memory(trainer.train_step, trainer.device)

    def _start(self, run: Run, seed: int) -> BeagleDraft:
        kind = HEADS[run.head][0]
        if run.after is None:
            torch.manual_seed(seed)
            if run.head != "beagle":
                return kind.from_target(self.target, self.vocab)
            every = {} if run.shared_keys else {"num_key_value_heads": self.target.config.num_attention_heads}
            draft = kind.from_target(self.target, self.vocab, **every)
            return draft if run.random else passing_start_on(draft, self.dataset, seed)
        draft = kind.from_pretrained(self.folder(run.after, seed) / "final").bind(self.target)
        draft.config.append_states = run.append_states
        return draft

    def _course(self, folder: Path) -> list[dict]:
        """The evaluations of a run: epochs of its phase, tokens seen, seconds of its steps and acceptance by depth."""
        course, seconds = [], 0.0
        for line in read_log(folder):
            seconds += line["seconds"]
            if "acceptance_by_depth" in line:
                point = {
                    "epoch": round(line["tokens_seen"] / self.tokens, 2),
                    "tokens_seen": line["tokens_seen"],
                    "seconds": round(seconds, 1),
                    "acceptance_by_depth": line["acceptance_by_depth"],
                }
                course.append(point)
        return course
