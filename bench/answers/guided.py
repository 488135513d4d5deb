"""Answers in JSON by schema: python -m bench.answers.guided --help

Each request of `json_requests` is answered under its schema's guide with each library that is installed, greedy and
sampled: by plain decoding, and by the draft with a tree and with one that also has a branch of copied tokens, which
takes what the grammar forces too. Counted are the plain answers that ended by themselves and that are JSON of their
schema, the drafted ones that equal them token for token, and tokens a round, beside those of the same prompts without
a guide. It measures acceptance, not time. Where two texts part, `lossless` tells a tie from a fault; with a fault
nothing is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from beagle_sd.data.conversations import encode_chat
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.guides.guide import Guide
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_bundled
from bench.answers.acceptance import counted, described
from bench.answers.json_requests import SCHEMAS, JsonRequest, is_valid, requests
from bench.answers.lossless import Agreement
from bench.answers.vllm import until_end
from bench.environment import machine, versions

LIBRARIES = ("xgrammar", "llguidance")
TREES = [TreeShape(4, 4, 16), TreeShape(4, 4, 16, 12)]


class Writer:
    """Writes answers to requests: a prompt, a seed, and the rest as the command line has it."""

    def __init__(self, target, tokenizer, draft, asked: Sequence[JsonRequest], args):
        self.target, self.tokenizer, self.draft, self.args = target, tokenizer, draft, args
        self.asked, self.ends = asked, end_tokens(target, tokenizer)
        self.prompts = [encode_chat(tokenizer, [{"role": "user", "content": one.text}]) for one in asked]

    def write(
        self, number: int, temperature: float, tree: TreeShape | None, guide: Guide | None = None
    ) -> tuple[list[int], Report]:
        """The new tokens of an answer, plain without a tree; its end token is among them."""
        made = generate(
            self.target,
            self.draft if tree else None,
            torch.tensor([self.prompts[number]], device=self.target.device),
            max_new_tokens=self.args.max_new_tokens,
            temperature=temperature,
            seed=self.args.seed + number,
            tree=tree,
            guide=guide,
        )
        new = made.sequences[0, len(self.prompts[number]) :].tolist()
        return until_end(new, self.ends), made.report

    def unguided(self, temperature: float) -> dict[str, float]:
        """Tree -> tokens a round without a guide."""
        return {
            str(tree): counted(self.write(number, temperature, tree)[1] for number in range(len(self.asked)))[
                "tokens_per_round"
            ]
            for tree in TREES
        }

    def guided(self, guides: Mapping[str, Guide], temperature: float) -> dict:
        """What came of all requests under their guides."""
        found, agreement = {"answers": len(self.asked), "ended": 0, "valid": 0, "equal": 0}, Agreement()
        reports: dict[str, list[Report]] = {str(tree): [] for tree in TREES}
        for number, request in enumerate(self.asked):
            guide, prompt = guides[request.schema], self.prompts[number]
            plain, _ = self.write(number, temperature, None, guide)
            ended = plain[-1] in self.ends
            found["ended"] += ended
            text = self.tokenizer.decode(plain[:-1] if ended else plain)
            found["valid"] += is_valid(text, SCHEMAS[request.schema])
            same = True
            for tree in TREES:
                drafted, report = self.write(number, temperature, tree, guide)
                reports[str(tree)].append(report)
                agreement.add(self.target, prompt, drafted, plain, temperature, self.args.seed + number)
                same &= drafted == plain
            found["equal"] += same
        told = {tree: counted(of_tree)["tokens_per_round"] for tree, of_tree in reports.items()}
        return {**found, "ties": agreement.ties, "faults": agreement.faults, "guided": told}


def guides_of(library: str, target, tokenizer, whitespace: bool) -> dict[str, Guide] | None:
    """A guide a schema; None where the library is not installed."""
    try:
        return {
            name: Guide.json(target, tokenizer, schema, whitespace=whitespace, library=library)
            for name, schema in SCHEMAS.items()
        }
    except ImportError as error:
        print(f"{library}: {error}", flush=True)
        return None


def measured_rows(writer: Writer, args) -> list[dict]:
    """A row a library and temperature; SystemExit where a drafted answer differs beyond a tie."""
    by_library = {name: guides_of(name, writer.target, writer.tokenizer, args.whitespace) for name in args.libraries}
    rows = []
    for temperature in args.temperatures:
        unguided = writer.unguided(temperature)
        for library, guides in by_library.items():
            if guides is None:
                continue
            row = {"library": library, "temperature": temperature, **writer.guided(guides, temperature)}
            rows.append(row | {"unguided": unguided})
            print(json.dumps(rows[-1]), flush=True)
            if row["faults"]:
                raise SystemExit(f"faults: {row['faults']} drafted answers differ from plain decoding beyond a tie")
    if not rows:
        raise SystemExit(f"no library of {', '.join(args.libraries)} is installed")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.guided", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50, help="requests, at most 50")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--no-whitespace", dest="whitespace", action="store_false", help="none between JSON's tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    target, tokenizer, draft = load_bundled(device="cpu")
    asked = requests(args.count)
    rows = measured_rows(Writer(target, tokenizer, draft, asked, args), args)
    header = described("smollm2-135m", "json_requests", len(asked), target, args)
    header["versions"] |= versions(*args.libraries)
    write_json(args.out, header | machine() | {"whitespace": args.whitespace, "rows": rows})


if __name__ == "__main__":
    main()
