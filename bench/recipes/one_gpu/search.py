"""The short runs that settle a draft's recipe: one change at a time, the best so far carried on."""

from __future__ import annotations

import json
import time

from beagle_sd.data.live import LiveDataset
from beagle_sd.files import write_json
from beagle_sd.training.trainer import TrainingStopped
from bench.recipes.one_gpu.job import Job, OutOfTime
from bench.recipes.one_gpu.recipe import BASE
from bench.recipes.one_gpu.training import dataset_of, draft_of, seed_all, target_of, try_run

CHOICES: list[tuple[float, list[dict]]] = [
    (1.003, [{"passing_start": False}]),
    (1.003, [{"lr": 1e-3}, {"lr": 4e-3}, {"lr": 8e-3}, {"lr": 3e-5}]),
    (1.003, [{"regression": 0.1}, {"regression": 10.0}]),
    (1.003, [{"block_share": 0.2}, {"block_share": 0.7}, {"block_share": 0.0}, {"block_share": 1.0}]),
    (1.003, [{"window": 5}, {"window": 3}, {"steps": 6}, {"window": 5, "steps": 6}]),
    (1.02, [{"mlp": 2}, {"heads": 2}]),
    (1.01, [{"draft_vocab": 16384}, {"draft_vocab": 0}]),
    (0.99, [{"draft_vocab": 4096}, {"all_key_heads": False}]),
    (1.003, [{"norm_query": False}, {"norm_state": False}, {"norm_output": False}]),
    (1.003, [{"noise": 0.1}, {"noise": 0.2}]),
    (1.003, [{"append_states": False}]),
]
"""Most important first. A change is kept if tokens a round of a chain grow by the factor: above 1 by as much as two
runs of the same may differ, more where the draft gets dearer; below 1 where it gets cheaper."""


def name_of(change: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in change.items()) or "base"


def search(job: Job) -> bool:
    """Run what is not in OUT/search/runs.json yet; write the best settings to OUT/search/best.json after each run.
    Returns whether all choices are settled."""
    path = job.out.part("search") / "runs.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    before = {json.dumps(row["settings"], sort_keys=True): row for row in known}
    seed_all(job.device)
    target, _ = target_of(job)
    dataset = dataset_of(job, target, job.sizes.search_steps * job.sizes.tokens_per_step)
    best, rows = None, []
    try:
        for factor, changes in [(0.0, [{}]), *CHOICES]:
            start = BASE if best is None else best["settings"]
            group: list[dict] = []
            for change in changes:
                settings = {**start, **change}
                key = json.dumps(settings, sort_keys=True)
                if key not in before:
                    before[key] = trial(job, target, dataset, change, settings)
                    write_json(path, list(before.values()))
                group.append(before[key])
                rows.append({**before[key], "kept": False})
            winner = max(group, key=lambda row: row["chain_tokens"])
            if best is None or winner["chain_tokens"] > factor * best["chain_tokens"]:
                best = winner
                rows[group.index(winner) - len(group)]["kept"] = True
            write_json(path.parent / "best.json", best)
            (path.parent / "table.md").write_text(table(rows), encoding="utf-8")
    except OutOfTime:
        job.record("search", finished=False, runs=len(rows))
        return False
    job.record("search", finished=True, runs=len(rows))
    return True


def table(rows: list[dict]) -> str:
    """The runs for a draft's card, in the order they were made; each starts from the last one kept."""
    lines = ["| change | tokens a round, chain | accepted by depth | loss | kept |", "|---|---|---|---|---|"]
    for row in rows:
        by_depth = " ".join(f"{share:.2f}" for share in row.get("acceptance_by_depth", []))
        lines.append(
            f"| {name_of(row['change'])} | {row['chain_tokens']:.3f} | {by_depth or row.get('stopped')} | "
            f"{row.get('loss', '')} | {'yes' if row['kept'] else ''} |"
        )
    return "\n".join(lines) + "\n"


def trial(job: Job, target, dataset: LiveDataset, change: dict, settings: dict) -> dict:
    """One run's line; a run that diverges counts as no token."""
    began = time.monotonic()
    job.budget.need()
    try:
        draft = draft_of(target, dataset, settings)
        found = try_run(job, draft, dataset, settings, job.sizes.search_steps)
        found["loss"] = round(found.pop("log")[-1]["loss"], 4)
    except TrainingStopped as error:
        found = {"seconds": round(time.monotonic() - began, 2), "chain_tokens": 0.0, "stopped": str(error)}
    print(f"  {name_of(change)}: {found['chain_tokens']} tokens a round as a chain, {found['seconds']} s")
    return {"change": change, "settings": settings, **found}
