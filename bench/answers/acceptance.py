"""Tokens a round and acceptance by depth on held-out prompts: python -m bench.answers.acceptance --help

Writes what a draft's card shows and what the default tree is chosen from. It measures acceptance, not time: prompts
run in batches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from bench.answers.real_prompts import batches, encoded_prompts
from bench.environment import versions

TREES = ["2,1,3", "4,1,5", "3,3,6", "4,4,8", "4,6,16"]
"""depth,branch,num_nodes"""


def counted(reports: Iterable[Report]) -> dict:
    """Tokens a round and acceptance by depth over all reports, weighted by rounds, and those rounds."""
    tokens, rounds, reached = 0.0, 0, []
    for report in reports:
        tokens += report.tokens_per_round * report.row_rounds
        rounds += report.row_rounds
        reached.append(report.reached)
    depths = [sum(column) for column in zip(*reached, strict=True)]
    return {
        "tokens_per_round": round(tokens / max(rounds, 1), 4),
        "acceptance_by_depth": [round(b / a, 4) for a, b in zip(depths, depths[1:]) if a],
        "row_rounds": rounds,
    }


def standard_error(tokens: Sequence[float], rounds: Sequence[int]) -> float | None:
    """Of sum(tokens) / sum(rounds), texts taken as independent; None for a single text."""
    made, took = (torch.tensor(values, dtype=torch.float64) for values in (tokens, rounds))
    if (count := len(made)) < 2:
        return None
    off = made - took * made.sum() / took.sum()
    return round((off.square().sum() * count / (count - 1)).sqrt().item() / took.sum().item(), 4)


def measure(target, draft, prompts, pad, tree: TreeShape, temperature: float, args) -> dict:
    """One row, over all prompts."""
    reports = (
        generate(
            target,
            draft,
            ids,
            mask,
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            seed=args.seed,
            tree=tree,
        ).report
        for ids, mask in batches(prompts, args.batch, pad)
    )
    return {**vars(tree), "temperature": temperature, **counted(reports)}


def described(target_name: str, prompts_name: str, count: int, target, args) -> dict:
    """What the rows were measured on and with."""
    return {
        "target": target_name,
        "prompts": prompts_name,
        "count": count,
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(target.dtype).removeprefix("torch."),
        "seed": args.seed,
        "device": str(target.device),
        "versions": versions("beagle_kernels", "torch", "transformers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--prompts", default="mt-bench", help="mt-bench, humaneval, gsm8k or editing")
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--trees", nargs="+", default=TREES, help="each depth,branch,num_nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype))
    draft = load_draft(args.draft or bundled_folder(args.target), target)
    prompts = encoded_prompts(args.prompts, tokenizer, args.count)
    rows = []
    for temperature in args.temperatures:
        for tree in map(TreeShape.parse, args.trees):
            rows.append(measure(target, draft, prompts, tokenizer.pad_token_id, tree, temperature, args))
            print(json.dumps(rows[-1]), flush=True)
    result = described(args.target, args.prompts, len(prompts), target, args) | {"shapes": rows}
    write_json(args.out, result)


if __name__ == "__main__":
    main()
