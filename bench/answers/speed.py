"""Seconds on real prompts against `target.generate`, as `beagle-sd bench` measures them, written for the tables:
python -m bench.answers.speed --help

Each prompt is decoded by every contender, in turn and in a rotating order; a row is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from beagle_kernels.machine import processor
from beagle_sd.cli.bench import comparison_table
from beagle_sd.decoding.trees.calibration import adaptive_tree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.evaluation.comparison import Comparison, compare_on
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from bench.environment import versions

TREES = ["2,1,3", "4,1,5", "4,4,8", "4,6,16"]
"""depth,branch,num_nodes"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--prompts", nargs="+", default=["mt-bench"], help="names of evaluation sets, or files")
    parser.add_argument("--count", type=int, default=20, help="prompts of each")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--trees", nargs="*", default=TREES, help="each depth,branch,num_nodes")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype))
    draft = load_draft(args.draft or bundled_folder(args.target), target)
    tree = adaptive_tree(target, draft, calibrate=True)
    about = {
        "target": args.target,
        "dtype": args.dtype,
        "count": args.count,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        **versions("torch", "transformers"),
    }

    def write(found: Comparison) -> None:
        """After each prompt: a run that is ended has those before it; a row says of how many answers it is."""
        if args.out:
            draft_ms = [[*vars(shape).values(), ms] for shape, ms in found.costs.draft.items()]
            costs = {"verify_ms": found.costs.verify, "draft_ms": draft_ms}
            write_json(args.out, {**about, **costs, "rows": [asdict(row) for row in found.rows]})

    rows, _ = compare_on(
        args.prompts,
        target,
        tokenizer,
        draft,
        tree,
        count=args.count,
        shapes=[*map(TreeShape.parse, args.trees)],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        on_progress=lambda source, done, total: print(f"{source}: {done} of {total}", flush=True),
        on_rows=write,
    )
    for source in args.prompts:
        Console(width=160).print(comparison_table(source, [row for row in rows if row.prompts == source]))


if __name__ == "__main__":
    main()
