"""The parts of bench.recipes.one_gpu: each returns whether it is done, False where its time ran out."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from beagle_kernels.extension import missing_cuda
from beagle_sd.data.answers import requests_of, write_answers
from beagle_sd.data.conversations import stored_answers, write_answer_file
from beagle_sd.data.evaluation_sets import EVALUATION_SETS, prompts_folder
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.data.shards import Sequence
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import load_draft
from beagle_sd.training.checkpoint import checkpoints
from beagle_sd.training.trainer import Trainer
from bench import processes
from bench.answers.acceptance import SHAPES, described, measure
from bench.answers.real_prompts import encoded_prompts
from bench.recipes.one_gpu.bundles import pack, unpack
from bench.recipes.one_gpu.kit import load_prompts, open_kit
from bench.recipes.one_gpu.work import (
    BASE,
    SETUP,
    OutOfTime,
    Work,
    config_of,
    draft_of,
    run,
    seed_all,
    try_run,
    write_json,
)

BUILD_SECONDS = 280.0
DEVIATION = 0.05
"""How far losses and gradient norms on a GPU, in bf16 and TF32, may be from those on the CPU without a warning."""
WANTED_SHAPES = ["4,6,16", "6,10,60", "4,1,5"]
"""What every evaluation set is measured with first; then MT-Bench with the other shapes of a draft's card."""


def setup(work: Work, kit: Path) -> bool:
    """Join the kit, build the extension where a GPU needs it, convert the target, and try every step once. Nothing,
    and at once, where all this was done before."""
    if (ready := work.scratch / "ready").exists():
        return True
    if not (work.kit / "about.json").is_file():
        open_kit(kit, work.kit)
        importlib.invalidate_caches()
    shutil.copytree(work.kit / "evaluation", prompts_folder(), dirs_exist_ok=True)
    if work.device == "cuda" and (reason := missing_cuda(torch.device("cuda"))):
        built = work.scratch / "built"
        if built.exists():
            raise ValueError(f"the extension was built but cannot be used: {reason}")
        print(f"setup: building the extension, since {reason}", flush=True)
        log = work.folder("setup") / "build.json"
        done = processes.run(
            [sys.executable, "-m", "bench.gpu.check", str(log), "build"], BUILD_SECONDS, log.with_suffix(".txt")
        )
        if done["status"] != "passed":
            raise ValueError(f"the build {done['status']}: {done['output']}")
        built.touch()
        os.execv(sys.executable, [sys.executable, "-m", "bench.recipes.one_gpu", *sys.argv[1:]])
    found = tried(work)
    if found["deviations"]:
        told = "; ".join(
            f"{name}: {mine:.5g} on the GPU, {cpus:.5g} on the CPU"
            for name, (mine, cpus) in found["deviations"].items()
        )
        print(f"setup: WARNING: {told}; within {DEVIATION:.0%} was expected. Nothing is held up", file=sys.stderr)
    work.record("setup", finished=True, **found)
    ready.touch()
    return True


def tried(work: Work) -> dict:
    """Every step at a tiny size: answers, both stages, decoding. On a GPU the losses are those of the CPU, or stand in
    "deviations"."""
    seed_all(work.device)
    prompts = load_prompts(work.want(work.kit / "prompts.npz", SETUP))[:8]
    target, tokenizer = work.target()
    asked = requests_of(((number, ids) for number, (ids, _) in enumerate(prompts)), work.sizes.temperatures)
    found = list(write_answers(target, asked, end=tokenizer.eos_token_id, batch=4, max_new_tokens=16, states=False))
    write_answer_file(work.scratch / "tried.npz", found, {})
    draft, mine = _two_steps(work, target)
    ids = torch.tensor([prompts[0][0]])
    options: dict[str, Any] = {"max_new_tokens": 16, "tree": TreeShape(4, 4, 16)}
    drafted, plain = (generate(target, one, ids, **options).sequences for one in (draft.to(target.dtype), None))
    cpus = mine
    if work.device == "cuda":
        cpu = Work(work.out, work.sizes, work.budget, "cpu")
        _, cpus = _two_steps(cpu, cpu.target()[0])
    return {
        "answers": len(found),
        "losses": mine,
        "deviations": deviations(mine, cpus),
        "drafted_equals_plain": torch.equal(drafted, plain),
    }


def deviations(mine: list[float], others: list[float]) -> dict[str, tuple[float, float]]:
    """What differs by more than DEVIATION, of the numbers of `_two_steps`."""
    names = (f"{what} of stage {stage}" for stage in (1, 2) for what in ("loss", "gradient norm"))
    return {
        name: (one, other)
        for name, one, other in zip(names, mine, others, strict=True)
        if not abs(one - other) <= DEVIATION * abs(other)
    }


def _two_steps(work: Work, target) -> tuple[BeagleDraft, list[float]]:
    """A fresh draft, and its loss and gradient norm in a step of either stage that changes nothing."""
    dataset = LiveDataset(target, Corpus.of_answers([work.scratch / "tried.npz"]), held_out=0, keep=True)
    draft = draft_of(target, dataset, BASE)
    log = try_run(work, draft, dataset, {**BASE, "lr": 0.0, "block_share": 0.5}, 2)["log"]
    return draft, [line[name] for line in log for name in ("loss", "gradient_norm")]


def answers(work: Work, graph: bool = True) -> bool:
    """The target answers every prompt at every temperature, into OUT/answers/answers-NN.npz."""
    seed_all(work.device)
    sizes = work.sizes
    prompts = load_prompts(work.want(work.kit / "prompts.npz", SETUP))
    target, tokenizer = work.target()
    files = _AnswerFiles(work.folder("answers"), sizes, {number: name for number, (_, name) in enumerate(prompts)})
    already, began = files.tokens, work.budget.spent
    asked = (
        request
        for turn in range(len(sizes.temperatures))
        for request in requests_of(((n, ids) for n, (ids, _) in enumerate(prompts)), sizes.temperatures, turn)
        if (request.index, round(request.temperature, 3)) not in files.done
    )
    written = write_answers(
        target,
        asked,
        end=tokenizer.eos_token_id,
        batch=sizes.batch,
        states=False,
        graph=graph,
        max_new_tokens=sizes.max_new_tokens,
        max_prompt_tokens=sizes.max_prompt_tokens,
    )
    finished = False
    try:
        for sequence in written:
            files.add(sequence)
            work.budget.need()
        finished = True
    except OutOfTime:
        pass
    finally:  # whatever ended it, what is written is kept
        files.save()
        spent = max(work.budget.spent - began, 1e-9)
        rate = round((files.tokens - already) / spent, 1)
        work.record(
            "answers",
            finished=finished,
            answers=len(files.done),
            answer_tokens=files.tokens,
            tokens_a_second=rate,
            graph=graph,
            batch=sizes.batch,
        )
        print(f"answers: {len(files.done)}, {files.tokens} tokens written by the target, {rate:.0f} a second now")
    return finished


class _AnswerFiles:
    """answers-NN.npz, each of about so many ids; the last is written anew, whole, as it grows."""

    def __init__(self, folder: Path, sizes, sources: dict[int, str]):
        self.folder, self.sizes, self.sources = folder, sizes, sources
        self.done: set[tuple[int, float]] = set()
        self.tokens = self.number = self.ids = self.unsaved = 0
        self.open: list[Sequence] = []
        for self.number, path in enumerate(sorted(folder.glob("answers-[0-9]*[0-9].npz"))):
            self.open, self.ids = [], 0
            for sequence in _sequences(path):
                self._take(sequence)
        self.unsaved = 0
        self._next()

    def add(self, sequence: Sequence) -> None:
        self._take(sequence)
        if self.unsaved >= self.sizes.ids_a_save or self.ids >= self.sizes.ids_a_file:
            self.save()

    def save(self) -> None:
        if self.unsaved:
            write_answer_file(self.folder / f"answers-{self.number:02d}.npz", self.open, self.sources)
            self.unsaved = 0
            self._next()

    def _take(self, sequence: Sequence) -> None:
        self.open.append(sequence)
        self.done.add((sequence.index, round(sequence.temperature, 3)))
        self.tokens += int(sequence.loss_mask.sum())
        self.ids += len(sequence.tokens) + 1
        self.unsaved += len(sequence.tokens) + 1

    def _next(self) -> None:
        """Begin another file if this one is full."""
        if self.ids >= self.sizes.ids_a_file:
            self.number, self.ids, self.open = self.number + 1, 0, []


def _sequences(path: Path) -> list[Sequence]:
    """A file's answers as the writer gave them."""
    stored = stored_answers(path)
    ids, none = torch.from_numpy(stored["ids"].astype("int64")), torch.empty(0)
    parts = ids.split(stored["lengths"].tolist())
    return [
        Sequence(part[:-1], torch.arange(len(part) - 1) >= prompt - 1, none, int(part[-1]), index, temperature)
        for part, prompt, index, temperature in zip(
            parts, stored["prompt_lengths"].tolist(), stored["index"].tolist(), stored["temperature"].tolist()
        )
    ]


def train(work: Work, minutes: float | None = None) -> bool:
    """Stage 1, then stage 2, in as many steps as `minutes` in all allow (default: this part's), with the settings of
    OUT/search/best.json; the draft goes to OUT/train/draft, what resuming elsewhere needs to OUT/train/checkpoint."""
    seed_all(work.device)
    folder, runs, name = work.folder("train"), work.scratch / "train", "checkpoint"
    target, _ = work.target()
    dataset = work.dataset(target, work.corpus())
    if not checkpoints(runs) and (folder / name / f"{name}.json").is_file():
        unpack(folder / name, name, runs)
    try:
        plan = _plan(work, target, dataset, folder / "plan.json", minutes)
        per_epoch = len(dataset.epoch(0, work.sizes.tokens_per_step, 0))
        steps = plan["steps"]
        config = config_of(
            plan["settings"],
            steps,
            per_epoch,
            work.sizes,
            eval_steps=max(1, steps // 10),
            save_steps=plan["save_steps"],
        )
        trainer = Trainer(draft_of(target, dataset, plan["settings"]), dataset, runs, config)
    except OutOfTime:
        return False

    def show(step: int, metrics: dict) -> None:
        if "acceptance_by_depth" in metrics:
            print(
                f"  step {step} of {steps}, {work.budget.spent:.0f} s: stage {metrics['stage']} loss "
                f"{metrics['loss']:.3f}, acceptance by depth {metrics['acceptance_by_depth']}"
            )

    finished = False
    try:
        run(trainer, work.budget, show)
        finished = True
    except OutOfTime:
        pass
    finally:  # whatever ended it, the last checkpoint is kept
        _bring_home(work, runs, folder, name)
        work.record(
            "train",
            finished=finished,
            plan=plan,
            step=trainer.step,
            tokens_seen=trainer.tokens_seen,
            epochs=round(trainer.step / per_epoch, 2),
            data_tokens=len(dataset.corpus.ids),
        )
    return finished


def _plan(work: Work, target, dataset: LiveDataset, path: Path, minutes: float | None) -> dict:
    """How many steps, from the time a step takes; made once, so that a resumed run has the same schedule."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    settings = work.settings()
    draft = draft_of(target, dataset, settings)
    log = try_run(work, draft, dataset, {**settings, "block_share": 0.5}, 2 * work.sizes.timed_steps)["log"]
    one, two = (statistics.median([line["seconds"] for line in log if line["stage"] == stage]) for stage in (1, 2))
    mean = settings["block_share"] * one + (1 - settings["block_share"]) * two
    left = 0.9 * (work.budget.seconds if minutes is None else 60 * minutes) - work.budget.spent
    plan = {
        "settings": settings,
        "searched": (work.out / "search").exists(),
        "seconds_a_step": [one, two],
        "steps": max(2, int(left / mean)),
        "save_steps": max(1, int(60 / mean)),
    }
    write_json(path, plan)
    print(f"train: {plan['steps']} steps of {one:.3f} and {two:.3f} s, with {settings}")
    return plan


def _bring_home(work: Work, runs: Path, folder: Path, name: str) -> None:
    """The log, the last checkpoint in small files, and its draft in bf16: the trained one, or as far as it has come."""
    if not (found := checkpoints(runs)):
        return
    shutil.copyfile(runs / "metrics.jsonl", folder / "metrics.jsonl")
    staging = work.scratch / "pack"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(found[-1], staging / found[-1].name)
    shutil.copyfile(runs / "metrics.jsonl", staging / "metrics.jsonl")
    pack(staging, folder / name, name, work.sizes.part_bytes)
    shutil.rmtree(staging)
    BeagleDraft.from_pretrained(found[-1]).to(torch.bfloat16).save_pretrained(folder / "draft")


def evaluate(work: Work) -> bool:
    """Acceptance and tokens a round of OUT/train/draft into OUT/evaluate/SET.json; MT-Bench's is the draft's card."""
    weights = work.want(work.out / "train" / "draft" / "model.safetensors", "train")
    target, tokenizer = work.target(torch.float32)
    torch.set_float32_matmul_precision("highest")
    draft = load_draft(weights.parent, target)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    others = [shape for shape in SHAPES if shape not in WANTED_SHAPES]
    todo = [(name, t, shape) for name in EVALUATION_SETS for t in (0.0, 1.0) for shape in WANTED_SHAPES]
    todo += [("mt-bench", t, shape) for t in (0.0, 1.0) for shape in others]
    args = Namespace(batch=work.sizes.eval_batch, max_new_tokens=work.sizes.new_tokens, seed=0)
    last = 0.0
    for name, temperature, text in todo:
        shape, path = TreeShape(*map(int, text.split(","))), work.folder("evaluate") / f"{name}.json"
        prompts = encoded_prompts(name, tokenizer, work.sizes.count, work.kit / "evaluation")
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("draft_sha256") != digest:
            found = {
                **described(work.target_name(), name, len(prompts), target, args),
                "draft_sha256": digest,
                "shapes": [],
            }
        if any(
            (TreeShape(row["depth"], row["branch"], row["num_nodes"]), row["temperature"]) == (shape, temperature)
            for row in found["shapes"]
        ):
            continue
        began = work.budget.spent
        try:
            work.budget.need(1.2 * last)
        except OutOfTime:
            work.record("evaluate", finished=False)
            return False
        row = measure(target, draft, prompts, tokenizer.pad_token_id, shape, temperature, args)
        last = work.budget.spent - began
        print(f"  {name}, T = {temperature}, {text}: {row['tokens_per_round']} tokens a round, {last:.1f} s")
        found["shapes"] = sorted([*found["shapes"], row], key=lambda row: (row["temperature"], row["num_nodes"]))
        write_json(path, found)
    work.record("evaluate", finished=True)
    return True
