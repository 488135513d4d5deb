"""The part `evaluate`: acceptance and tokens a round of the trained draft on the evaluation sets."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace

import torch

from beagle_sd.data.evaluation_sets import EVALUATION_SETS
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import load_draft
from bench.answers.acceptance import TREES, described, measure
from bench.answers.real_prompts import encoded_prompts
from bench.recipes.one_gpu.job import Job, OutOfTime
from bench.recipes.one_gpu.training import target_of

FIRST_TREES = ["4,6,16", "6,10,60", "4,1,5"]
"""What every evaluation set is measured with first; then MT-Bench with the other trees of a draft's card."""


def in_turn() -> list[tuple[str, float, str]]:
    """(set, temperature, tree), most important first: each is kept as soon as it is measured, and time may end."""
    others = [shape for shape in TREES if shape not in FIRST_TREES]
    first = [(name, t, shape) for name in EVALUATION_SETS for t in (0.0, 1.0) for shape in FIRST_TREES]
    return first + [("mt-bench", t, shape) for t in (0.0, 1.0) for shape in others]


def evaluate(job: Job) -> bool:
    """Acceptance and tokens a round of OUT/train/draft into OUT/evaluate/SET.json; MT-Bench's is the draft's card."""
    weights = job.out.require(job.out.path / "train" / "draft" / "model.safetensors", "train")
    target, tokenizer = target_of(job, torch.float32)
    torch.set_float32_matmul_precision("highest")
    draft = load_draft(weights.parent, target)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    args = Namespace(batch=job.sizes.eval_batch, max_new_tokens=job.sizes.new_tokens, seed=0)
    last = 0.0
    for name, temperature, text in in_turn():
        tree, path = TreeShape.parse(text), job.out.part("evaluate") / f"{name}.json"
        prompts = encoded_prompts(name, tokenizer, job.sizes.count, job.out.kit / "evaluation")
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("draft_sha256") != digest:
            found = {
                **described(job.out.target_name(), name, len(prompts), target, args),
                "draft_sha256": digest,
                "shapes": [],
            }
        if any(
            (TreeShape(row["depth"], row["branch"], row["num_nodes"]), row["temperature"]) == (tree, temperature)
            for row in found["shapes"]
        ):
            continue
        began = job.budget.spent
        try:
            job.budget.need(1.2 * last)
        except OutOfTime:
            job.record("evaluate", finished=False)
            return False
        row = measure(target, draft, prompts, tokenizer.pad_token_id, tree, temperature, args)
        last = job.budget.spent - began
        print(f"  {name}, T = {temperature}, {text}: {row['tokens_per_round']} tokens a round, {last:.1f} s")
        found["shapes"] = sorted([*found["shapes"], row], key=lambda row: (row["temperature"], row["num_nodes"]))
        write_json(path, found)
    job.record("evaluate", finished=True)
    return True
