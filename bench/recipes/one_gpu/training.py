"""What a run of training is: target, data, draft and trainer made from settings, and a short run's measure."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import load_target
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.start import passing_start_on
from beagle_sd.training.trainer import Trainer
from bench.recipes.one_gpu.job import Budget, Job, OutOfTime
from bench.recipes.one_gpu.recipe import Sizes


def seed_all(device: str) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # the paper trains in TF32


def target_of(job: Job, dtype: torch.dtype | None = None):
    """(target, tokenizer) of the kit, on the job's device."""
    name = job.out.target_name()
    return load_target(job.out.kit / name if name == "target" else name, dtype=dtype, device=job.device)


def dataset_of(job: Job, target, tokens: int | None = None) -> LiveDataset:
    """The answers, the first `tokens` of them or all, with the target's states: all on the device at once where they
    take no more than half of what is free."""
    corpus = Corpus.of_answers(job.out.answer_files(), tokens)
    size = 2 * len(corpus.ids) * target.config.get_text_config().hidden_size
    keep = job.device == "cpu" or size <= torch.cuda.mem_get_info()[0] // 2
    dataset = LiveDataset(target, corpus, held_out=job.sizes.held_out, keep=keep)
    how = "held" if keep else "to be computed in every step, since they are too many to hold"
    print(f"  states of {len(corpus.ids)} tokens {how} ({job.budget.spent:.0f} s)")
    return dataset


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
    """A fresh draft of these settings, with the same weights each time."""
    torch.manual_seed(0)
    config = target.config.get_text_config()
    is_beagle, heads = kind is BeagleDraft, settings["heads"] * config.num_attention_heads
    shared = settings["heads"] * config.num_key_value_heads
    wide = {
        "intermediate_size": settings["mlp"] * config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if is_beagle and settings["all_key_heads"] else shared,
    }
    vocab = min(settings["draft_vocab"], config.vocab_size)
    ids = dataset.frequent_tokens(vocab, config.vocab_size).to(target.device) if vocab else None
    names = ("norm_query", "norm_state", "norm_output", "append_states")
    draft = kind.from_target(target, ids, **wide, **{name: settings[name] for name in names})
    return passing_start_on(draft, dataset, 0) if is_beagle and settings["passing_start"] else draft


def run_within(budget: Budget, trainer: Trainer, watch: Callable[[int, dict], None]) -> None:
    """Train to the end, calling watch(step, metrics) after every step; OutOfTime, after a checkpoint, without time."""

    def after(step: int, metrics: dict) -> None:
        watch(step, metrics)
        if step < trainer.total_steps and budget.spent > budget.seconds:
            trainer.save()
            raise OutOfTime

    trainer.run(after)


def try_run(
    job: Job,
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
    folder = job.out.scratch / "try"
    shutil.rmtree(folder, ignore_errors=True)
    per_epoch = len(dataset.epoch(0, job.sizes.tokens_per_step, 0))
    config = config_of(settings, steps, per_epoch, job.sizes, eval_steps=eval_steps, save_steps=10**9)
    trainer = Trainer(draft, dataset, folder, config, **more)
    began, log = time.monotonic(), []
    try:
        run_within(job.budget, trainer, lambda step, metrics: log.append({"step": step, **metrics}))
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
