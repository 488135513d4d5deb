"""The training runs behind the paper's figures, each done once and shared by all figures that need it.

A run of phase 1 starts from a fresh draft; one of phase 2 from the draft that a run of phase 1 left, with an optimizer
of its own. Both see the same tokens, so that all runs of a phase are equal in tokens, learning rate and order of data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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
from bench.peers.eagle2 import EagleDraft, eagle_states
from bench.recipes.paper.replay import replay


@dataclass(frozen=True)
class Run:
    """window: positions a window has, in stage 1 or, if simulated, in stage 2; after: the run of phase 1 whose draft
    it starts from. A fresh Beagle draft has a key head for every query head unless it shares them as the target's do,
    and starts by `passing_start` unless at random."""

    window: int
    after: str | None = None
    simulated: bool = False
    append_states: bool = True
    head: str = "beagle"
    shared_keys: bool = False
    random: bool = False


RUNS = {
    "next": Run(1),
    "block": Run(5),
    "eagle2": Run(1, head="eagle2"),
    "next-next": Run(1, after="next"),
    "block-block": Run(5, after="block"),
    "next-steps4": Run(4, after="next", simulated=True),
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

    def config(self, run: Run, seed: int, tokens: int) -> TrainingConfig:
        """A run's, evaluated about twice an epoch of `tokens`; the phases go through the data in different orders."""
        return TrainingConfig(
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
            seed=2 * seed + (run.after is not None),
        )


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
            found = {"run": name, "seed": seed, "settings": asdict(self.settings), "course": self._course(folder)}
            for kind, shape in SHAPES.items():
                found[kind] = replay(draft, self.states, self.settings.held_out, *shape)
            write_json(done, found)
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["settings"] != asdict(self.settings):
            raise ValueError(
                f"{folder} was run with {found['settings']}, not {asdict(self.settings)}; use the same "
                "settings, or a new --work folder"
            )
        return found

    def _trained(self, name: str, seed: int) -> BeagleDraft:
        run = RUNS[name]
        if run.after is not None:
            self.result(run.after, seed)
        draft, states = self._start(run, seed), HEADS[run.head][1]
        config = self.settings.config(run, seed, self.tokens)
        trainer = Trainer(draft, self.dataset, self.folder(name, seed), config, states=states)

        def show(step: int, metrics: dict) -> None:
            if "acceptance_by_depth" in metrics:
                print(
                    f"{name}, seed {seed}, step {step} of {trainer.total_steps}: loss {metrics['loss']:.3f}, "
                    f"acceptance by depth {metrics['acceptance_by_depth']}",
                    flush=True,
                )

        trainer.run(show)
        return draft.eval()

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
        """The evaluations of a run: epochs of its phase, tokens seen and acceptance by depth."""
        return [
            {
                "epoch": round(line["tokens_seen"] / self.tokens, 2),
                "tokens_seen": line["tokens_seen"],
                "acceptance_by_depth": line["acceptance_by_depth"],
            }
            for line in read_log(folder)
            if "acceptance_by_depth" in line
        ]
