"""Seconds on real prompts against `target.generate`, paired runs on one machine: python -m bench.speed --help

Each prompt is decoded by every contender, in turn and in a rotating order; a row is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from beagle_sd.adaptive import AdaptiveTree
from beagle_sd.bundled import bundled_folder, load_draft, load_target, measured_acceptance
from beagle_sd.calibration import Costs, choose_shape, measure_costs
from beagle_sd.generate import TreeShape, generate
from bench.real_prompts import batches, encoded_prompts


def contenders(target, draft, shapes: list[TreeShape], costs: Costs, measured: dict, options: dict) -> dict:
    """name -> run(ids, mask) -> (new tokens, tokens a round or None if it does not say)."""

    def plain(ids, mask):
        out = target.generate(ids, attention_mask=mask, do_sample=False, **options)
        return out.shape[1] - ids.shape[1], 1.0

    def ours(shape):
        def run(ids, mask):
            found = generate(target, draft if shape.num_nodes > 1 else None, ids, mask, **options,
                             depth=shape.depth, branch=shape.branch, num_nodes=shape.num_nodes)  # fmt: skip
            return found.report.new_tokens, found.report.tokens_per_round

        return run

    def prompt_lookup(ids, mask):
        out = target.generate(ids, attention_mask=mask, do_sample=False, prompt_lookup_num_tokens=4, **options)
        return out.shape[1] - ids.shape[1], None

    def adaptive(ids, mask):
        found = generate(target, draft, ids, mask, **options, adaptive=AdaptiveTree(costs, measured))
        return found.report.new_tokens, found.report.tokens_per_round

    named = {"target.generate": plain, "transformers prompt lookup": prompt_lookup}
    for shape in shapes:
        kind = "plain" if shape.num_nodes == 1 else "chain" if shape.branch == 1 else "tree"
        named[f"beagle {kind}, {shape.num_nodes} nodes, depth {shape.depth}, branch {shape.branch}"] = ours(shape)
    named["beagle, adaptive tree"] = adaptive
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype))
    folder = args.draft or bundled_folder(args.target)
    draft = load_draft(folder, target)
    measured = {TreeShape(row["depth"], row["branch"], row["num_nodes"]): row["tokens_per_round"]
                for row in measured_acceptance(folder) if row["temperature"] == 0.0}  # fmt: skip
    costs = measure_costs(target, draft, list(measured))
    chosen = choose_shape(costs, measured)
    shapes = list(dict.fromkeys([TreeShape(1, 1, 1), TreeShape(4, 1, 5), TreeShape(4, 4, 8), TreeShape(4, 6, 16),
                                 chosen]))  # fmt: skip
    runs = contenders(target, draft, shapes, costs, measured, {"max_new_tokens": args.max_new_tokens})
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rounds: dict[str, list[float | None]] = {name: [] for name in runs}
    prompts = list(batches(encoded_prompts(args.prompts, tokenizer, args.count), 1, tokenizer.pad_token_id))
    for number, (ids, mask) in enumerate([prompts[0], *prompts]):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            tokens, per_round = runs[name](ids, mask)
            if number:
                seconds[name].append((time.perf_counter() - began) / tokens)
                rounds[name].append(per_round)
    rows = []
    for name in runs:
        ratios = sorted(base / own for base, own in zip(seconds["target.generate"], seconds[name], strict=True))
        quantiles = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
        rows.append({"contender": name, "ms_per_token": round(1e3 * statistics.median(seconds[name]), 2),
                     "tokens_per_round": None if None in rounds[name] else round(statistics.mean(rounds[name]), 3),
                     "speedup_20_50_80": [round(quantiles[place], 3) for place in (1, 4, 7)]})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    result = {"target": args.target, "dtype": args.dtype, "prompts": args.prompts, "count": args.count,
              "max_new_tokens": args.max_new_tokens, "threads": torch.get_num_threads(),
              "processor": platform.processor() or platform.machine(), "chosen_from_costs": vars(chosen),
              "verify_ms": costs.verify, "torch": torch.__version__, "transformers": transformers.__version__,
              "rows": rows}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
