"""The part `setup`: the kit joined, the extension built, the target converted, and every step tried once."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beagle_kernels.extension import missing_cuda
from beagle_sd.data.answers import requests_of, write_answers
from beagle_sd.data.conversations import write_answer_file
from beagle_sd.data.evaluation_sets import prompts_folder
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.ends import end_tokens
from bench import processes
from bench.recipes.one_gpu.job import Job
from bench.recipes.one_gpu.kit import load_prompts, open_kit
from bench.recipes.one_gpu.recipe import BASE
from bench.recipes.one_gpu.training import draft_of, seed_all, target_of, try_run

BUILD_SECONDS = 280.0
DEVIATION = 0.05
"""How far losses and gradient norms on a GPU, in bf16 and TF32, may be from those on the CPU without a warning."""


def setup(job: Job, kit: Path) -> bool:
    """Join the kit, build the extension where a GPU needs it, convert the target, and try every step once. Nothing,
    and at once, where all this was done before."""
    if (ready := job.out.scratch / "ready").exists():
        return True
    if not (job.out.kit / "about.json").is_file():
        open_kit(kit, job.out.kit)
        importlib.invalidate_caches()
    shutil.copytree(job.out.kit / "evaluation", prompts_folder(), dirs_exist_ok=True)
    if job.device == "cuda" and (reason := missing_cuda(torch.device("cuda"))):
        built = job.out.scratch / "built"
        if built.exists():
            raise ValueError(f"the extension was built but cannot be used: {reason}")
        print(f"setup: building the extension, since {reason}", flush=True)
        log = job.out.part("setup") / "build.json"
        done = processes.run(
            [sys.executable, "-m", "bench.gpu.check", str(log), "build"], BUILD_SECONDS, log.with_suffix(".txt")
        )
        if done["status"] != "passed":
            raise ValueError(f"the build {done['status']}: {done['output']}")
        built.touch()
        os.execv(sys.executable, [sys.executable, "-m", "bench.recipes.one_gpu", *sys.argv[1:]])
    found = try_every_step(job)
    if found["deviations"]:
        differing = "; ".join(
            f"{name}: {here:.5g} on the GPU, {on_cpu:.5g} on the CPU"
            for name, (here, on_cpu) in found["deviations"].items()
        )
        print(
            f"setup: WARNING: {differing}; within {DEVIATION:.0%} was expected. The next parts can be run all the same",
            file=sys.stderr,
        )
    job.record("setup", finished=True, **found)
    ready.touch()
    return True


def try_every_step(job: Job) -> dict:
    """Every step at a tiny size: answers, both stages, decoding. On a GPU the losses are those of the CPU, or stand in
    "deviations"."""
    seed_all(job.device)
    prompts = load_prompts(job.out.prompts_file())[:8]
    target, tokenizer = target_of(job)
    requests = requests_of(((number, ids) for number, (ids, _) in enumerate(prompts)), job.sizes.temperatures)
    ends = end_tokens(target, tokenizer)
    found = list(write_answers(target, requests, ends=ends, batch=4, max_new_tokens=16, states=False))
    write_answer_file(job.out.scratch / "tried.npz", found, {})
    draft, losses = _two_steps(job, target)
    ids = torch.tensor([prompts[0][0]])
    options: dict[str, Any] = {"max_new_tokens": 16, "tree": TreeShape(4, 4, 16)}
    drafted, plain = (generate(target, one, ids, **options).sequences for one in (draft.to(target.dtype), None))
    on_cpu = losses
    if job.device == "cuda":
        host = replace(job, device="cpu")
        _, on_cpu = _two_steps(host, target_of(host)[0])
    return {
        "answers": len(found),
        "losses": losses,
        "deviations": deviations(losses, on_cpu),
        "drafted_equals_plain": torch.equal(drafted, plain),
    }


def deviations(found: list[float], expected: list[float]) -> dict[str, tuple[float, float]]:
    """What differs by more than DEVIATION, of the numbers of `_two_steps`."""
    names = (f"{what} of stage {stage}" for stage in (1, 2) for what in ("loss", "gradient norm"))
    return {
        name: (one, other)
        for name, one, other in zip(names, found, expected, strict=True)
        if not abs(one - other) <= DEVIATION * abs(other)
    }


def _two_steps(job: Job, target) -> tuple[BeagleDraft, list[float]]:
    """A fresh draft, and its loss and gradient norm in a step of either stage that changes nothing."""
    dataset = LiveDataset(target, Corpus.of_answers([job.out.scratch / "tried.npz"]), held_out=0, keep=True)
    draft = draft_of(target, dataset, BASE)
    log = try_run(job, draft, dataset, {**BASE, "lr": 0.0, "block_share": 0.5}, 2)["log"]
    return draft, [line[name] for line in log for name in ("loss", "gradient_norm")]
