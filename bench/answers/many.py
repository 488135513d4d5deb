"""Many prompts over a few rows: python -m bench.answers.many --help

Greedy answers to prompts of MT-Bench, GSM8K and HumanEval in a shuffled order, each with a limit of its own, so that
they end at different times. Three ways write them, in turns, all over the same prompts:

- `generate_many`: a row whose text has ended takes the next prompt;
- "waits": `generate` over batches in the same order. It takes one max_new_tokens, the largest of a batch, and a
  stopping criterion ends each row at its own limit; criteria are asked of a token once all rows in progress have it, so
  a row that drafts ahead may write a few tokens more, which are cut. Each batch waits for its longest text; rows that
  have ended cost no more compute.
- "waits, ended rows computed on": the same without that last, as a loop does which keeps its batch's width.

All have an engine that they keep, so that none allocates more often than another. With the draft, by a tree of fixed
shape, and without. A ratio is of two passes over all prompts in one turn, by seconds a token. The three texts of each
prompt are compared; where they part, `lossless` tells a tie from a fault, and with a fault nothing is written.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import StoppingCriteria

from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.loop import Decoding
from beagle_sd.decoding.many import Request, generate_many
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_bundled
from bench.answers.acceptance import described
from bench.answers.lossless import Agreement
from bench.answers.real_prompts import batches, encoded_prompts
from bench.answers.vllm import until_end
from bench.engines.comparison import spread
from bench.environment import machine

SETS = ("mt-bench", "gsm8k", "humaneval")
REFILLED, WAITS, COMPUTED_ON = "generate_many", "waits", "waits, ended rows computed on"


@dataclass
class Pass:
    """All prompts answered once: each one's tokens, forwards of the target after the prefills, seconds."""

    tokens: list[list[int]]
    rounds: int
    seconds: float = 0.0

    @property
    def pace(self) -> float:
        return self.seconds / sum(map(len, self.tokens))


class OwnLimits(StoppingCriteria):
    """Ends each row of a batch at its own number of new tokens."""

    def __init__(self, prompt: int, limits: Sequence[int]):
        self.ends = torch.tensor(limits) + prompt

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return input_ids.shape[1] >= self.ends.to(input_ids.device)


@contextmanager
def computed_on() -> Iterator[None]:
    """Rounds run over all rows of the engine within, ended ones too."""
    packed = Decoding._pack
    Decoding._pack = lambda self: self.engine.batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decoding._pack = packed  # type: ignore[method-assign]


def refilled(engine: Engine, requests: Sequence[Request]) -> Pass:
    """By generate_many."""
    many = generate_many(engine.model, engine.draft, requests, engine=engine)
    found = {answer.request.key: answer.tokens.tolist() for answer in many}
    return Pass([found[request.key] for request in requests], many.report.rounds)


def waits(engine: Engine, requests: Sequence[Request], *, on: bool = False) -> Pass:
    """By generate, batch after batch; on: ended rows are computed on."""
    pad = engine.model.generation_config.pad_token_id or 0
    ends, found, rounds = end_tokens(engine.model), [], 0
    with computed_on() if on else nullcontext():
        for number, (ids, mask) in enumerate(batches([request.ids for request in requests], engine.batch, pad)):
            limits = [one.max_new_tokens for one in requests[number * engine.batch :][: len(ids)]]
            made = generate(
                engine.model,
                engine.draft,
                ids,
                mask,
                max_new_tokens=max(limits),
                stopping_criteria=[OwnLimits(ids.shape[1], limits)],
                engine=engine,
            )
            new = made.sequences[:, ids.shape[1] :].tolist()
            found += [until_end(row[:limit], ends) for row, limit in zip(new, limits, strict=True)]
            rounds += made.report.rounds
    return Pass(found, rounds)


WAYS: dict[str, Callable[[Engine, Sequence[Request]], Pass]] = {
    REFILLED: refilled,
    WAITS: waits,
    COMPUTED_ON: partial(waits, on=True),
}


def mixed_requests(
    tokenizer, count: int, least: int, most: int, seed: int, folder: Path | None = None
) -> list[Request]:
    """`count` requests, of each set as many, shuffled, each with a limit of new tokens from `least` to `most`."""
    drawn = random.Random(seed)
    sizes = [count // len(SETS) + (number < count % len(SETS)) for number in range(len(SETS))]
    prompts = [
        ids for name, size in zip(SETS, sizes, strict=True) for ids in encoded_prompts(name, tokenizer, size, folder)
    ]
    drawn.shuffle(prompts)
    return [Request(ids, key=key, max_new_tokens=drawn.randint(least, most)) for key, ids in enumerate(prompts)]


def in_turns(engines: dict[str, Engine], requests: Sequence[Request], repeats: int) -> dict[str, list[Pass]]:
    """Each way's passes, `repeats` of them, in an order that turns by one from time to time."""
    found: dict[str, list[Pass]] = {name: [] for name in engines}
    names = list(engines)
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            engines[name].forget()
            began = time.perf_counter()
            made = WAYS[name](engines[name], requests)
            made.seconds = time.perf_counter() - began
            found[name].append(made)
    return found


def rows_of(target, requests: Sequence[Request], found: dict[str, list[Pass]]) -> list[dict]:
    """A row a way: how many texts are generate_many's first, and how many times as fast generate_many is, by turns."""
    truth = found[REFILLED][0].tokens
    rows = []
    for name, passes in found.items():
        agreement = Agreement()
        for made in passes:
            for request, tokens, right in zip(requests, made.tokens, truth, strict=True):
                if tokens != right:
                    agreement.add(target, request.ids, tokens, right, 0.0, 0)
        same = [all(made.tokens[number] == right for made in passes) for number, right in enumerate(truth)]
        ratios = [made.pace / own.pace for made, own in zip(passes, found[REFILLED], strict=True)]
        rows.append(
            {
                "way": name,
                "texts": len(truth),
                "equal": sum(same),
                "ties": agreement.ties,
                "faults": agreement.faults,
                "tokens": sum(map(len, passes[0].tokens)),
                "rounds": passes[0].rounds,
                "tokens_per_second": round(1 / median(made.pace for made in passes), 2),
                "ratio": None if name == REFILLED else spread(ratios),
            }
        )
    return rows


def measured_rows(target, draft, requests: Sequence[Request], args) -> list[dict]:
    """The rows without and with the draft; SystemExit where texts differ beyond a tie."""
    capacity = max(len(request.ids) for request in requests) + max(request.max_new_tokens for request in requests)
    rows: list[dict] = []
    for drafting in (None, draft):
        engines = {
            name: Engine(target, drafting, batch=args.batch, capacity=capacity, tree=args.tree if drafting else None)
            for name in WAYS
        }
        longest = sorted(requests, key=lambda request: len(request.ids) + request.max_new_tokens)
        in_turns(engines, longest[-args.batch :], 1)  # buffers grow
        found = rows_of(target, requests, in_turns(engines, requests, args.repeats))
        rows += [{"tree": str(args.tree) if drafting else None, **row} for row in found]
        print(*map(json.dumps, found), sep="\n", flush=True)
        if any(row["faults"] for row in found):
            raise SystemExit("faults: texts of one prompt differ beyond a tie")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--limits", type=int, nargs=2, default=[16, 192], help="least and most of max_new_tokens")
    parser.add_argument("--repeats", type=int, default=6, help="passes of each way; a bound needs 5")
    parser.add_argument("--tree", type=TreeShape.parse, default=TreeShape(3, 3, 6), help="depth,branch,num_nodes")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the limits")
    parser.add_argument("--folder", type=Path, help="where the sets are; default: the cache, downloaded if need be")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    target, tokenizer, draft = load_bundled(device="cpu")
    least, most = args.limits
    requests = mixed_requests(tokenizer, args.count, least, most, args.seed, args.folder)
    rows = measured_rows(target, draft, requests, args)
    args.max_new_tokens = most
    header = described("smollm2-135m", ", ".join(SETS), len(requests), target, args) | machine()
    settings = {"batch": args.batch, "limits": args.limits, "repeats": args.repeats}
    write_json(args.out, header | settings | {"rows": rows})


if __name__ == "__main__":
    main()
