"""A draft inside vLLM: python -m bench.answers.vllm --help

Plain vLLM, its n-gram speculation, Beagle's draft at two depths and this package's own loop write the same greedy
answers, in turns, batch by batch. Every engine has a process of its own and waits while another is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from beagle_sd.vllm.checks import check_version, vllm_version
from beagle_sd.vllm.serve import speculative_config
from bench.answers.acceptance import described
from bench.answers.real_prompts import batches, encoded_prompts

PLAIN = "vLLM"
"""What the others are compared with."""
DEPTHS = (2, 4)


@dataclass
class Written:
    """Of one call: the new tokens of each prompt, rounds summed over rows, and how many accepted 1, 2, ... tokens."""

    tokens: list[list[int]]
    rounds: int = 0
    accepted: list[int] = field(default_factory=list)


Contender = Callable[[list[list[int]]], Written]


def own_loop(target, draft, depth: int, new_tokens: int) -> Contender:
    """beagle_sd.generate with a chain of `depth`, 0: without the draft."""
    ends = target.generation_config.eos_token_id
    pad = target.generation_config.pad_token_id or 0

    def write(prompts: list[list[int]]) -> Written:
        ((ids, mask),) = batches(prompts, len(prompts), pad)
        chain = TreeShape(depth, 1, depth + 1) if depth else None
        out = generate(target, draft if depth else None, ids, mask, max_new_tokens=new_tokens, tree=chain)
        rows = [until_end(row, ends) for row in out.sequences[:, ids.shape[1] :].tolist()]
        reached = out.report.reached[1 : depth + 1]
        return Written(rows, out.report.row_rounds, reached + [0] * (depth - len(reached)))

    return write


def until_end(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    """Up to the first end token."""
    stops = [tokens.index(end) + 1 for end in ([ends] if isinstance(ends, int) else ends or []) if end in tokens]
    return tokens[: min(stops, default=len(tokens))]


@contextmanager
def vllm_engine(target: Path | str, speculative: dict | None, args) -> Iterator[Contender]:
    """An engine of vLLM's, with the defaults but for what the comparison needs."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=args.batch,
        speculative_config=speculative,
        enable_prefix_caching=False,  # the same prompts come again
        disable_log_stats=False,
        # a worker of its own would watch for work without a pause
        distributed_executor_backend="uni",
        enforce_eager=args.eager,
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_new_tokens)

    def write(prompts: list[list[int]]) -> Written:
        before = counts(llm)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        after = counts(llm)
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        return Written(rows, after[0] - before[0], [a - b for a, b in zip(after[1:], before[1:], strict=True)])

    try:
        yield write
    finally:
        llm.llm_engine.engine_core.shutdown()


def counts(llm) -> list[int]:
    """Rounds so far, and drafted tokens accepted at each depth; zeros without speculation."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in found:
        return [0]
    accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return [found["vllm:spec_decode_num_drafts"].value, *accepted]


def in_turns(contenders: dict[str, Contender], blocks: list[list[list[int]]], repeats: int) -> dict[str, list]:
    """(Written, seconds) of each contender for each block, `repeats` times over; who comes first changes."""
    names = list(contenders)
    for name in names:
        contenders[name](blocks[0])  # what is compiled and allocated once
    found: dict[str, list] = {name: [] for name in names}
    for turn in range(repeats * len(blocks)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            written = contenders[name](blocks[turn % len(blocks)])
            found[name].append((written, time.perf_counter() - began))
    return found


def rows_of(found: dict[str, list], blocks: int) -> Iterator[dict]:
    """A row a contender: tokens, counts and texts of one pass over the blocks, times of all."""
    for name, calls in found.items():
        one = [written for written, _ in calls[:blocks]]
        plain = [written for written, _ in found[PLAIN][:blocks]]
        texts = [text for written in one for text in written.tokens]
        equal = [a == b for a, b in zip(texts, (text for written in plain for text in written.tokens), strict=True)]
        speeds = [sum(map(len, written.tokens)) / took for written, took in calls]
        ratios = [mine / theirs for mine, theirs in zip(speeds, speeds_of(found[PLAIN]), strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5) if len(ratios) > 1 else (ratios[0], ratios[0])
        rounds, accepted = sum(w.rounds for w in one), [sum(c) for c in zip(*(w.accepted for w in one), strict=True)]
        yield {
            "contender": name,
            "texts": len(texts),
            "texts_equal": sum(equal),
            "tokens": sum(map(len, texts)),
            "rounds": rounds,
            "accepted_by_depth": accepted,
            "tokens_per_round": round(1 + sum(accepted) / rounds, 4) if rounds and accepted else None,
            "tokens_per_second": round(statistics.median(speeds), 2),
            "ratio": {"low": round(low, 3), "median": round(statistics.median(ratios), 3), "high": round(high, 3)},
        }


def speeds_of(calls: list) -> list[float]:
    """Tokens a second of each call."""
    return [sum(map(len, written.tokens)) / took for written, took in calls]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.answers.vllm", description=__doc__)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", type=Path, help="a folder; default: the bundled one")
    parser.add_argument("--prompts", default="mt-bench", help="an evaluation set")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="times over all prompts")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    check_version()
    target, tokenizer = load_target(args.target, dtype=getattr(torch, args.dtype), device="cpu")
    folder = args.draft or bundled_folder(args.target)
    draft = load_draft(folder, target)
    prompts = encoded_prompts(args.prompts, tokenizer, args.count)
    blocks = [prompts[start : start + args.batch] for start in range(0, len(prompts), args.batch)]
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    speculative = {PLAIN: None, "vLLM, n-grams": ngram}
    speculative |= {f"vLLM, beagle k = {k}": speculative_config(args.target, folder, k) for k in DEPTHS}
    contenders = {
        "beagle_sd.generate, plain": own_loop(target, draft, 0, args.max_new_tokens),
        f"beagle_sd.generate, chain of {DEPTHS[-1]}": own_loop(target, draft, DEPTHS[-1], args.max_new_tokens),
    }
    found = with_engines(Path(target.config._name_or_path), speculative, contenders, blocks, args)
    header = described(args.target, args.prompts, args.count, target, args)
    header["versions"]["vllm"] = vllm_version()
    header |= {"batch": args.batch, "threads": torch.get_num_threads(), "compiled": not args.eager}
    rows = list(rows_of(found, len(blocks)))
    print(*map(json.dumps, rows), sep="\n")
    write_json(args.out, header | {"rows": rows})


def with_engines(
    model: Path, speculative: dict[str, dict | None], contenders: dict[str, Contender], blocks: list, args
) -> dict[str, list]:
    """`in_turns` of vLLM's engines and the others, with all engines up at once."""
    from contextlib import ExitStack

    with ExitStack() as engines:
        made = {name: engines.enter_context(vllm_engine(model, how, args)) for name, how in speculative.items()}
        return in_turns(made | contenders, blocks, args.repeats)


if __name__ == "__main__":
    main()
