"""EAGLE-2's head and ours, trained on the same answers in one run: acceptance over time, tokens a round, memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.data.shards import Sequence, ShardWriter
from beagle_sd.files import write_json
from beagle_sd.models.draft import BeagleDraft
from bench.recipes.one_gpu.job import Job, OutOfTime
from bench.recipes.one_gpu.training import chain_tokens, dataset_of, draft_of, seed_all, target_of, try_run

SHAPES = {"chain of 4": (4, 1, 5), "16 nodes": (4, 6, 16), "60 nodes": (6, 10, 60)}
ANSWERS = 64
"""Held-out greedy answers that tokens a round are counted on."""
RUNS = {
    "beagle": {},
    "eagle2": {"window": 1, "block_share": 1.0},
    "eagle2, regression 10": {"window": 1, "block_share": 1.0, "regression": 10.0},
}
"""Changes to the chosen settings. EAGLE-2 trains in one stage, on next tokens; 10 is its own weight."""


def eagle2(job: Job) -> bool:
    """Train each for the same number of steps and replay held-out answers; the comparison is OUT/eagle2/runs.json."""
    try:
        from bench.peers.eagle2 import EagleDraft, eagle_states
        from bench.recipes.paper.replay import replay
    except ImportError as error:
        raise ValueError(f"EAGLE-2's head is not in this checkout ({error}); it is bench/peers/eagle2.py") from error
    path, settings, sizes = job.out.part("eagle2") / "runs.json", job.out.settings(), job.sizes
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    seed_all(job.device)
    target, _ = target_of(job)
    steps = sizes.compared_steps
    dataset = dataset_of(job, target, steps * sizes.tokens_per_step)
    shards = held_out_answers(dataset, job.out.scratch / "held-out")
    on_cpu, _ = target_of(replace(job, device="cpu"))
    try:
        for name, change in RUNS.items():
            if name in runs:
                continue
            kind, more = (BeagleDraft, {}) if name == "beagle" else (EagleDraft, {"states": eagle_states})
            job.budget.need()
            runs[name] = train_head(job, target, dataset, {**settings, **change}, kind, more)
            draft = kind.from_pretrained(job.out.scratch / "compared").bind(on_cpu)
            for shape, numbers in SHAPES.items():
                runs[name][shape] = replay(draft, shards, sizes.held_out, *numbers)
            write_json(path, runs)
            print(
                f"  {name}: {runs[name]['chain_tokens']} tokens a round as a chain on held-out windows, "
                f"{runs[name]['16 nodes']['tokens_per_round']} with 16 nodes, {runs[name]['seconds']} s"
            )
    except OutOfTime:
        job.record("eagle2", finished=False)
        return False
    job.record("eagle2", finished=True, seconds_to_eagle2=seconds_to(runs), answers=ANSWERS)
    return True


def train_head(job: Job, target, dataset: LiveDataset, settings: dict, kind: type[BeagleDraft], more: dict) -> dict:
    """One head: its course by training seconds, its end, and the most memory that training took beyond the data's."""
    before = 0
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    draft = draft_of(target, dataset, settings, kind)
    steps = job.sizes.compared_steps
    found = try_run(
        job, draft, dataset, settings, steps, eval_steps=max(2, steps // 10), keep=job.out.scratch / "compared", **more
    )
    peak = torch.cuda.max_memory_allocated() - before if job.device == "cuda" else None
    return {"settings": settings, "course": course_of(found.pop("log")), **found, "peak_bytes": peak}


def course_of(log: list[dict]) -> list[dict]:
    """The evaluations of a run, by the seconds of training before them: those of steps that hold one are left out."""
    course, spent = [], 0.0
    for line in log:
        if "acceptance_by_depth" not in line:
            spent += line["seconds"]
            continue
        accepted = line["acceptance_by_depth"]
        course.append(
            {
                "step": line["step"],
                "tokens": line["tokens_seen"],
                "seconds": round(spent, 3),
                "acceptance_by_depth": accepted,
                "chain_tokens": chain_tokens(accepted),
            }
        )
    return course


def held_out_answers(dataset: LiveDataset, folder: Path) -> Path:
    """A folder of shards with ANSWERS of the held-out greedy answers and their states."""
    shutil.rmtree(folder, ignore_errors=True)
    corpus: Corpus = dataset.corpus
    writer = ShardWriter(folder, {})
    ends, kept = corpus.lengths.cumsum(0), 0
    for entry in dataset.evaluation:
        if kept == ANSWERS:
            break
        answer = int(torch.searchsorted(ends, entry.start, right=True))
        if corpus.temperature[answer] == 0.0:
            batch = dataset.load([entry])
            end = int(corpus.ids[ends[answer] - 1])
            writer.add(Sequence(batch.tokens, batch.loss_mask, batch.states.cpu(), end, int(corpus.index[answer]), 0.0))
            kept += 1
    writer.flush()
    return folder


def seconds_to(runs: dict) -> dict[str, float | None]:
    """Training seconds after which each run first had what the better EAGLE-2 had at its end; None: it never did."""
    goal = max(row["chain_tokens"] for name, row in runs.items() if name != "beagle")
    return {
        name: next((point["seconds"] for point in row["course"] if point["chain_tokens"] >= goal), None)
        for name, row in runs.items()
    }
