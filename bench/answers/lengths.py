"""Tokens a round, and what a round's parts take, by length of the text: python -m bench.answers.lengths --help

Documents and code, cut to each length, with a question, and chats with the same last question behind more and more
turns; one prompt at a time. With --window-keys the same weights are measured with and without a window.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from beagle_sd.models.target import Target
from bench.answers.acceptance import counted, described, standard_error
from bench.answers.long_texts import KINDS, prompts_of

LENGTHS = [300, 1500, 4000, 7000]
_NOT_OF_A_ROUND = ("prefill", "capture")


def measure(target, draft, prompts: list[list[int]], tree: TreeShape, temperature: float, args) -> dict:
    """One row: tokens a round with its standard error over texts and acceptance by depth, weighted by rounds;
    milliseconds of a round, of its draft and target; the target's certainty of what it wrote."""
    made = [
        generate(
            target,
            draft,
            torch.tensor([ids], device=target.device),
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            seed=args.seed + number,
            tree=tree,
            graph=False,
        )
        for number, ids in enumerate(prompts)
    ]
    reports = [one.report for one in made]
    rounds = [report.row_rounds for report in reports]
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report.seconds)
    found = counted(reports)
    of_rounds = sum(took for phase, took in seconds.items() if phase not in _NOT_OF_A_ROUND)
    parts = {"draft_ms": seconds["draft"], "target_ms": seconds["target"], "round_ms": of_rounds}
    chances = [_chances(draft.target, one.sequences[0], len(ids)) for one, ids in zip(made, prompts, strict=True)]
    return {
        "tokens": round(sum(map(len, prompts)) / len(prompts)),
        "temperature": temperature,
        **found,
        "standard_error": standard_error([one.tokens_per_round * one.row_rounds for one in reports], rounds),
        **{name: round(1e3 * took / max(found["row_rounds"], 1), 3) for name, took in parts.items()},
        "certainty": round(torch.cat(chances).mean().item(), 4),
    }


@torch.inference_mode()
def _chances(target: Target, text: Tensor, prompt: int) -> Tensor:
    """The probability that the target gives each new token, at temperature 1."""
    states = target.states(text[None, :-1])[0, prompt - 1 :]
    return target.head(states).float().softmax(-1).gather(1, text[prompt:, None])[:, 0]


def measured_rows(target, tokenizer, draft, args, done: list[dict]):
    """A row for each kind, length, window and temperature, but for those that are done."""
    tree, own = TreeShape.parse(args.tree), draft.config.window_keys
    windows = [own] if args.window_keys is None else [window or None for window in args.window_keys]
    known = {_place(row) for row in done}
    for kind in args.kinds:
        missing = [place for place in product([kind], args.lengths, windows, args.temperatures) if place not in known]
        if not missing:
            continue
        found = prompts_of(kind, target, tokenizer, args.lengths, args.count, args.folder)
        for _, length, window, temperature in missing:
            draft.config.window_keys = window
            row = measure(target, draft, found[length], tree, temperature, args)
            yield {"kind": kind, "length": length, "window_keys": window, **row}
    draft.config.window_keys = own


def _place(row: dict) -> tuple:
    return row["kind"], row["length"], row["window_keys"], row["temperature"]


def _in_order(row: dict) -> tuple:
    kind, length, window, temperature = _place(row)
    return KINDS.index(kind), length, window or 0, temperature


def _done(out: Path, header: dict) -> list[dict]:
    """The rows of a file that was measured in the same way; ValueError for another."""
    if not out.is_file():
        return []
    kept = json.loads(out.read_text(encoding="utf-8"))
    rows = kept.pop("rows")
    if other := [key for key in kept.keys() | header.keys() if kept.get(key) != header.get(key)]:
        was, now = ({key: one.get(key) for key in sorted(other)} for one in (kept, header))
        raise ValueError(f"{out} was measured with {was}, not {now}; allowed: the same, or without --resume")
    return rows


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
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --out; that draft and texts are the same is not checked"
    )
    args = parser.parse_args(arguments)
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype))
    draft = load_draft(args.draft or bundled_folder(args.target), target)
    name = "bundled" if args.draft is None else str(args.draft)
    header = described(args.target, "long texts", args.count, target, args)
    header |= {"draft": name, "tree": args.tree, "threads": torch.get_num_threads()}
    rows = _done(args.out, header) if args.resume else []
    for row in measured_rows(target, tokenizer, draft, args, rows):
        rows = sorted([*rows, row], key=_in_order)
        print(json.dumps(row), flush=True)
        write_json(args.out, header | {"rows": rows})


if __name__ == "__main__":
    main()
