"""Speculative decoding against `target.generate` and plain sampling, token for token: python -m bench.answers.lossless

Greedy must equal target.generate(do_sample=False); sampled must equal `draft=None` with the same seed. Where two
texts part, the two tokens' perturbed logits are computed anew from the common prefix: a gap below 1e-3 is a tie
that rounding decides, counted; anything larger is a fault, and the run fails.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from beagle_kernels.reference.philox import gumbel
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from bench.answers.real_prompts import batches, encoded_prompts

TIE = 1e-3
TREES = {"chain of 4": TreeShape(4, 1, 5), "tree of 16": TreeShape(4, 6, 16)}
SAMPLINGS = {
    "greedy": {},
    "T=0.7": dict(temperature=0.7),
    "T=1": dict(temperature=1.0),
    "T=1,top-p=0.9,min-p=0.05": dict(temperature=1.0, top_p=0.9, min_p=0.05),
}


@dataclass
class Agreement:
    """How many tokens were compared (up to the first that differs), and how many texts part at a tie or by a fault."""

    tokens: int = 0
    ties: int = 0
    faults: int = 0

    def add(self, model, prompt: list[int], found: list[int], truth: list[int], temperature: float, seed: int) -> None:
        """Compare one row's new tokens."""
        for index, (ours, theirs) in enumerate(zip(found, truth)):
            self.tokens += 1
            if ours == theirs:
                continue
            gap = perturbed_gap(model, prompt + truth[:index], ours, theirs, temperature, seed)
            if gap < TIE:
                self.ties += 1
            else:
                self.faults += 1
            return
        if len(found) != len(truth):
            self.faults += 1


@torch.inference_mode()
def perturbed_gap(model, prefix: list[int], ours: int, theirs: int, temperature: float, seed: int) -> float:
    """|difference| of the two tokens' z + T g after `prefix`."""
    z = model(torch.tensor([prefix])).logits[0, -1].float()
    if temperature > 0:
        noise = gumbel(torch.tensor([seed]), torch.tensor([len(prefix)]), len(z), 0, None, None)[0]
        z = z + temperature * noise
    return float((z[ours] - z[theirs]).abs())


def new_tokens(sequences: Tensor, prompt: int, ends: int) -> list[list[int]]:
    """Each row's new tokens, up to its end token."""
    rows = []
    for row in sequences[:, prompt:].tolist():
        rows.append(row[: row.index(ends) + 1] if ends in row else row)
    return rows


def truths(model, prompts, pad: int, batch: int, max_new_tokens: int, sampling: dict) -> list[Tensor]:
    """The right sequences, a tensor a batch: of target.generate when greedy, else of plain sampling."""
    if not sampling:
        return [
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
            for ids, mask in batches(prompts, batch, pad)
        ]
    return [
        generate(
            model, None, ids, mask, seed=seeds_of(number, len(ids)), max_new_tokens=max_new_tokens, **sampling
        ).sequences
        for number, (ids, mask) in enumerate(batches(prompts, batch, pad))
    ]


def seeds_of(number: int, rows: int) -> Tensor:
    """The rows' seeds in batch `number`."""
    return torch.arange(rows) + 1000 * number


def compare(
    model,
    draft,
    prompts,
    pad: int,
    batch: int,
    tree: TreeShape,
    max_new_tokens: int,
    sampling: dict,
    truth: list[Tensor] | None = None,
) -> Agreement:
    """All prompts in batches of `batch`, against the truth for `sampling`."""
    result = Agreement()
    truth = truth or truths(model, prompts, pad, batch, max_new_tokens, sampling)
    for number, (ids, mask) in enumerate(batches(prompts, batch, pad)):
        seeds = seeds_of(number, len(ids))
        found = generate(model, draft, ids, mask, max_new_tokens=max_new_tokens, seed=seeds, tree=tree, **sampling)
        width = ids.shape[1]
        rows = zip(new_tokens(found.sequences, width, pad), new_tokens(truth[number], width, pad), strict=True)
        for row, (ours, theirs) in enumerate(rows):
            prompt = ids[row][mask[row] == 1].tolist()
            result.add(model, prompt, ours, theirs, sampling.get("temperature", 0.0), int(seeds[row]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.lossless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--samplings", nargs="+", default=list(SAMPLINGS), choices=list(SAMPLINGS))
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    model, tokenizer = load_target("smollm2-135m", dtype=torch.float32, device="cpu")
    draft = load_draft(args.draft or bundled_folder("smollm2-135m"), model)
    prompts = encoded_prompts("mt-bench", tokenizer, args.count)
    rows = []
    for sampling in args.samplings:
        for batch in (1, 4):
            common = tokenizer.pad_token_id, batch
            truth = truths(model, prompts, *common, args.max_new_tokens, SAMPLINGS[sampling])
            for name, tree in TREES.items():
                result = compare(model, draft, prompts, *common, tree, args.max_new_tokens, SAMPLINGS[sampling], truth)
                rows.append({"sampling": sampling, "shape": name, "batch": batch, **asdict(result)})
                print(json.dumps(rows[-1]), flush=True)
                if args.out:
                    write_json(args.out, rows)
    if any(row["faults"] for row in rows):
        raise SystemExit("faults: speculative decoding differed from the truth beyond a tie")


if __name__ == "__main__":
    main()
