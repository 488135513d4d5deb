"""The part `train`: stage 1, then stage 2, in as many steps as the minutes allow."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import torch

from beagle_sd.data.live import LiveDataset
from beagle_sd.files import write_json
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.checkpoint import checkpoints
from beagle_sd.training.trainer import Trainer
from bench.recipes.one_gpu.bundles import pack, unpack
from bench.recipes.one_gpu.job import Job, OutOfTime
from bench.recipes.one_gpu.training import config_of, dataset_of, draft_of, run_within, seed_all, target_of, try_run


def train(job: Job, minutes: float | None = None) -> bool:
    """Stage 1, then stage 2, in as many steps as `minutes` in all allow (default: this part's), with the settings of
    OUT/search/best.json; the draft goes to OUT/train/draft, what resuming elsewhere needs to OUT/train/checkpoint."""
    seed_all(job.device)
    folder, runs, name = job.out.part("train"), job.out.scratch / "train", "checkpoint"
    target, _ = target_of(job)
    dataset = dataset_of(job, target)
    if not checkpoints(runs) and (folder / name / f"{name}.json").is_file():
        unpack(folder / name, name, runs)
    try:
        plan = _plan(job, target, dataset, folder / "plan.json", minutes)
        per_epoch = len(dataset.epoch(0, job.sizes.tokens_per_step, 0))
        steps = plan["steps"]
        config = config_of(
            plan["settings"],
            steps,
            per_epoch,
            job.sizes,
            eval_steps=max(1, steps // 10),
            save_steps=plan["save_steps"],
        )
        trainer = Trainer(draft_of(target, dataset, plan["settings"]), dataset, runs, config)
    except OutOfTime:
        return False

    def show(step: int, metrics: dict) -> None:
        if "acceptance_by_depth" in metrics:
            print(
                f"  step {step} of {steps}, {job.budget.spent:.0f} s: stage {metrics['stage']} loss "
                f"{metrics['loss']:.3f}, acceptance by depth {metrics['acceptance_by_depth']}"
            )

    finished = False
    try:
        run_within(job.budget, trainer, show)
        finished = True
    except OutOfTime:
        pass
    finally:  # whatever ended it, the last checkpoint is kept
        _bring_home(job, runs, folder, name)
        job.record(
            "train",
            finished=finished,
            plan=plan,
            step=trainer.step,
            tokens_seen=trainer.tokens_seen,
            epochs=round(trainer.step / per_epoch, 2),
            data_tokens=len(dataset.corpus.ids),
        )
    return finished


def _plan(job: Job, target, dataset: LiveDataset, path: Path, minutes: float | None) -> dict:
    """How many steps, from the time a step takes; made once, so that a resumed run has the same schedule."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    settings = job.out.settings()
    draft = draft_of(target, dataset, settings)
    log = try_run(job, draft, dataset, {**settings, "block_share": 0.5}, 2 * job.sizes.timed_steps)["log"]
    one, two = (statistics.median([line["seconds"] for line in log if line["stage"] == stage]) for stage in (1, 2))
    mean = settings["block_share"] * one + (1 - settings["block_share"]) * two
    left = 0.9 * (job.budget.seconds if minutes is None else 60 * minutes) - job.budget.spent
    plan = {
        "settings": settings,
        "searched": (job.out.path / "search").exists(),
        "seconds_a_step": [one, two],
        "steps": max(2, int(left / mean)),
        "save_steps": max(1, int(60 / mean)),
    }
    write_json(path, plan)
    print(f"train: {plan['steps']} steps of {one:.3f} and {two:.3f} s, with {settings}")
    return plan


def _bring_home(job: Job, runs: Path, folder: Path, name: str) -> None:
    """The log, the last checkpoint in small files, and its draft in bf16: the trained one, or as far as it has come."""
    if not (found := checkpoints(runs)):
        return
    shutil.copyfile(runs / "metrics.jsonl", folder / "metrics.jsonl")
    staging = job.out.scratch / "pack"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(found[-1], staging / found[-1].name)
    shutil.copyfile(runs / "metrics.jsonl", staging / "metrics.jsonl")
    pack(staging, folder / name, name, job.sizes.part_bytes)
    shutil.rmtree(staging)
    BeagleDraft.from_pretrained(found[-1]).to(torch.bfloat16).save_pretrained(folder / "draft")
