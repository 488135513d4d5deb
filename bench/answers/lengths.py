"""Tokens a round, and what a round's parts take, by length of the text: python -m bench.answers.lengths --help

Documents with a question, chats of many turns, and code with a question; the same texts at each length, one prompt at
a time. With --window-keys the same weights are measured with and without a window.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from bench.answers.acceptance import described
from bench.answers.long_texts import KINDS, prompts_of

LENGTHS = [300, 1500, 4000, 7000]
_NOT_OF_A_ROUND = ("prefill", "capture")


def measure(target, draft, prompts: list[list[int]], tree: TreeShape, temperature: float, args) -> dict:
    """One row: tokens a round and acceptance by depth over all prompts, weighted by rounds, and milliseconds of a round
    and of its draft and target."""
    tokens, rounds, reached = 0.0, 0, []
    seconds: dict[str, float] = {}
    for number, ids in enumerate(prompts):
        report = generate(
            target,
            draft,
            torch.tensor([ids], device=target.device),
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            seed=args.seed + number,
            tree=tree,
            graph=False,
        ).report
        tokens += report.tokens_per_round * report.row_rounds
        rounds += report.row_rounds
        reached.append(report.reached)
        for phase, took in report.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + took
    depths = [sum(column) for column in zip(*reached, strict=True)]
    of_rounds = sum(took for phase, took in seconds.items() if phase not in _NOT_OF_A_ROUND)
    each = {name: round(1e3 * seconds.get(name, 0.0) / max(rounds, 1), 3) for name in ("draft", "target")}
    return {
        "tokens": round(sum(map(len, prompts)) / len(prompts)),
        "temperature": temperature,
        "tokens_per_round": round(tokens / max(rounds, 1), 4),
        "acceptance_by_depth": [round(b / a, 4) for a, b in zip(depths, depths[1:]) if a],
        "row_rounds": rounds,
        "draft_ms": each["draft"],
        "target_ms": each["target"],
        "round_ms": round(1e3 * of_rounds / max(rounds, 1), 3),
    }


def measured_rows(target, tokenizer, draft, args):
    """A row for each kind, length, window and temperature."""
    tree, own = TreeShape.parse(args.tree), draft.config.window_keys
    windows = [own] if args.window_keys is None else [window or None for window in args.window_keys]
    for kind in args.kinds:
        for length, prompts in prompts_of(kind, target, tokenizer, args.lengths, args.count, args.folder).items():
            for window in windows:
                draft.config.window_keys = window
                for temperature in args.temperatures:
                    row = measure(target, draft, prompts, tree, temperature, args)
                    yield {"kind": kind, "length": length, "window_keys": window, **row}
    draft.config.window_keys = own


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.lengths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--window-keys", type=int, nargs="+", help="windows in turn, 0: none; default: the draft's own")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompt, about")
    parser.add_argument("--count", type=int, default=6, help="texts of each kind, at most 6 of documents and code")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--tree", default="4,6,16", help="depth,branch,num_nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, help="where the texts are; default: the cache, downloaded if need be")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype))
    draft = load_draft(args.draft or bundled_folder(args.target), target)
    name = "bundled" if args.draft is None else str(args.draft)
    header = described(args.target, "long texts", args.count, target, args)
    header |= {"draft": name, "tree": args.tree, "threads": torch.get_num_threads()}
    rows = []
    for row in measured_rows(target, tokenizer, draft, args):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(args.out, header | {"rows": rows})


if __name__ == "__main__":
    main()
