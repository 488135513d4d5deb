"""What the parts share: sizes, the folder they work in, time, and what a run of the trainer is."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import load_target
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.start import passing_start_on
from beagle_sd.training.trainer import Trainer
from bench.gpu.check import environment


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are for one H100 or H200 and a target of 135M parameters."""

    batch: int = 1024
    max_prompt_tokens: int = 192
    max_new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    ids_a_file: int = 12_000_000
    ids_a_save: int = 1_500_000
    tokens_per_step: int = 32768
    warmup_steps: int = 50
    eval_tokens: int = 131072
    held_out: int = 50
    search_steps: int = 200
    timed_steps: int = 20
    compared_steps: int = 400
    count: int = 80
    new_tokens: int = 128
    eval_batch: int = 80
    part_bytes: int = 15 << 20


TOY = Sizes(
    batch=8,
    max_new_tokens=16,
    ids_a_file=600,
    ids_a_save=200,
    tokens_per_step=256,
    warmup_steps=2,
    eval_tokens=256,
    held_out=5,
    search_steps=4,
    timed_steps=4,
    compared_steps=4,
    count=2,
    new_tokens=8,
    eval_batch=2,
    part_bytes=1 << 20,
)
"""To try every part on a CPU."""

BASE = {
    "lr": 2e-3,
    "regression": 1.0,
    "block_share": 0.45,
    "window": 1,
    "steps": 4,
    "noise": 0.0,
    "draft_vocab": 8192,
    "mlp": 1,
    "heads": 1,
    "all_key_heads": True,
    "passing_start": True,
    "norm_query": True,
    "norm_state": True,
    "norm_output": True,
    "append_states": True,
}
"""The bundled draft's recipe. draft_vocab 0: all tokens; mlp, heads: that many times the target's; all_key_heads: a
key head for every query head; passing_start: training starts by `passing_start`; block_share: stage 1's part of the
steps. EAGLE-2's head has the target's key heads and its own start."""


SETUP = "setup --kit FOLDER"


class OutOfTime(Exception):
    """The part's time is used up; what it has is saved."""


class Budget:
    """A part's minutes, of which `late` seconds were over when it began; the last 3% are for saving."""

    clock = staticmethod(time.monotonic)

    def __init__(self, minutes: float, late: float = 0.0):
        self.began, self.seconds = self.clock(), 0.97 * 60.0 * minutes - late

    @property
    def spent(self) -> float:
        return self.clock() - self.began

    def need(self, seconds: float = 0.0) -> None:
        """OutOfTime unless so many seconds are left."""
        if self.spent + seconds > self.seconds:
            raise OutOfTime


class Work:
    """The folder: what every part made is in OUT/PART, in files of less than 16 MiB; OUT/kit and OUT/scratch stay
    on the machine."""

    def __init__(self, out: Path, sizes: Sizes, budget: Budget, device: str | None = None):
        self.out, self.sizes, self.budget = out, sizes, budget
        self.kit, self.scratch = out / "kit", out / "scratch"
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def folder(self, part: str) -> Path:
        (self.out / part).mkdir(parents=True, exist_ok=True)
        return self.out / part

    def want(self, path: Path, part: str) -> Path:
        """The path, which `part` makes; FileNotFoundError says so where it is not there."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: run `bench/recipes/one_gpu.sh {self.out} {part}` first")
        return path

    def target_name(self) -> str:
        """ "target" where the kit brought a folder."""
        return json.loads(self.want(self.kit / "about.json", SETUP).read_text(encoding="utf-8"))["target"]

    def target(self, dtype: torch.dtype | None = None):
        """(target, tokenizer) of the kit."""
        name = self.target_name()
        return load_target(self.kit / name if name == "target" else name, dtype=dtype, device=self.device)

    def answers(self) -> list[Path]:
        self.want(self.out / "answers" / "answers-00.npz", "answers")
        return sorted((self.out / "answers").glob("answers-[0-9]*.npz"))

    def settings(self) -> dict:
        """What the search chose; the bundled draft's recipe where it has not run."""
        best = self.out / "search" / "best.json"
        return json.loads(best.read_text(encoding="utf-8"))["settings"] if best.is_file() else BASE

    def corpus(self, tokens: int | None = None) -> Corpus:
        return Corpus.of_answers(self.answers(), tokens)

    def dataset(self, target, corpus: Corpus) -> LiveDataset:
        """The corpus with its states: all on the device at once where they take no more than half of what is free."""
        size = 2 * len(corpus.ids) * target.config.get_text_config().hidden_size
        keep = self.device == "cpu" or size <= torch.cuda.mem_get_info()[0] // 2
        dataset = LiveDataset(target, corpus, held_out=self.sizes.held_out, keep=keep)
        how = "held" if keep else "to be computed in every step, since they are too many to hold"
        print(f"  states of {len(corpus.ids)} tokens {how} ({self.budget.spent:.0f} s)")
        return dataset

    def record(self, part: str, **found) -> None:
        """Write what a part has to say into OUT/PART/record.json."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        write_json(
            self.folder(part) / "record.json",
            {
                "part": part,
                **found,
                "seconds": round(self.budget.spent, 1),
                "peak_bytes": peak,
                "environment": environment(),
            },
        )


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def seed_all(device: str) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # the paper trains in TF32


def config_of(settings: dict, steps: int, per_epoch: int, sizes: Sizes, **more) -> TrainingConfig:
    """The trainer's config for so many steps of these settings."""
    block = round(steps * settings["block_share"])
    return TrainingConfig(
        window=settings["window"],
        steps=settings["steps"],
        block_epochs=block / per_epoch,
        simulation_epochs=(steps - block) / per_epoch,
        tokens_per_step=sizes.tokens_per_step,
        lr=settings["lr"],
        schedule="cosine",
        warmup_steps=min(sizes.warmup_steps, max(1, steps // 10)),
        regression=settings["regression"],
        noise=settings["noise"],
        autocast=True,
        eval_tokens=sizes.eval_tokens,
        held_out=sizes.held_out,
        **more,
    )


def draft_of(target, dataset: LiveDataset, settings: dict, kind: type[BeagleDraft] = BeagleDraft) -> BeagleDraft:
    """A fresh draft of these settings; the same for the same."""
    torch.manual_seed(0)
    config = target.config.get_text_config()
    ours, heads = kind is BeagleDraft, settings["heads"] * config.num_attention_heads
    shared = settings["heads"] * config.num_key_value_heads
    wide = {
        "intermediate_size": settings["mlp"] * config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if ours and settings["all_key_heads"] else shared,
    }
    vocab = min(settings["draft_vocab"], config.vocab_size)
    ids = dataset.frequent_tokens(vocab, config.vocab_size).to(target.device) if vocab else None
    names = ("norm_query", "norm_state", "norm_output", "append_states")
    draft = kind.from_target(target, ids, **wide, **{name: settings[name] for name in names})
    return passing_start_on(draft, dataset, 0) if ours and settings["passing_start"] else draft


def run(trainer: Trainer, budget: Budget, watch: Callable[[int, dict], None]) -> None:
    """Train to the end, calling watch(step, metrics) after every step; OutOfTime, after a checkpoint, without time."""

    def after(step: int, metrics: dict) -> None:
        watch(step, metrics)
        if step < trainer.total_steps and budget.spent > budget.seconds:
            trainer.save()
            raise OutOfTime

    trainer.run(after)


def try_run(
    work: Work,
    draft: BeagleDraft,
    dataset: LiveDataset,
    settings: dict,
    steps: int,
    *,
    eval_steps: int = 10**9,
    keep: Path | None = None,
    **more,
) -> dict:
    """A short run in the scratch folder: the metrics of its steps, its acceptance on held-out text, and its tokens a
    round as a chain.

    keep: where to leave the trained draft; more: for the trainer.
    """
    folder = work.scratch / "try"
    shutil.rmtree(folder, ignore_errors=True)
    per_epoch = len(dataset.epoch(0, work.sizes.tokens_per_step, 0))
    config = config_of(settings, steps, per_epoch, work.sizes, eval_steps=eval_steps, save_steps=10**9)
    trainer = Trainer(draft, dataset, folder, config, **more)
    began, log = time.monotonic(), []
    try:
        run(trainer, work.budget, lambda step, metrics: log.append({"step": step, **metrics}))
        if keep is not None:
            draft.save_pretrained(keep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    accepted = log[-1]["acceptance_by_depth"]
    return {
        "steps": trainer.step,
        "tokens": trainer.tokens_seen,
        "seconds": round(time.monotonic() - began, 2),
        "acceptance_by_depth": accepted,
        "chain_tokens": chain_tokens(accepted),
        "log": log,
    }


def chain_tokens(acceptance: list[float]) -> float:
    """Tokens a round of a chain whose drafts are accepted so: 1 + a_0 + a_0 a_1 + ..."""
    total, reached = 1.0, 1.0
    for share in acceptance:
        reached *= share
        total += reached
    return round(total, 4)
