"""A draft inside vLLM: python -m bench.answers.vllm --help

Plain vLLM, its n-gram speculation, Beagle's draft at two depths and this package's own loop write the same greedy
answers, in turns, batch by batch. Every engine has a process of its own and sleeps while another is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from beagle_sd.vllm.checks import check_version, vllm_version
from beagle_sd.vllm.serve import speculative_config
from bench.answers.acceptance import described
from bench.answers.real_prompts import batches, encoded_prompts

PLAIN = "vLLM"
"""What the others are compared with."""
DEPTHS = (2, 4)
_PAUSE = 0.5
"""Seconds, after which the threads of the one before sleep."""


@dataclass
class Written:
    """Of one call: the new tokens of each prompt, rounds after the first token summed over rows, and how many rounds
    accepted 1, 2, ... drafted tokens."""

    tokens: list[list[int]]
    rounds: int = 0
    accepted: list[int] = field(default_factory=list)


Contender = Callable[[list[list[int]]], Written]


def own_loop(target, draft, depth: int, new_tokens: int) -> Contender:
    """beagle_sd.generate with a chain of `depth`, 0: without the draft."""
    ends = end_tokens(target)
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
    """An engine of vLLM's in a process of its own, whose counts are then its own too."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_engine_process, args=(there, str(target), speculative, args))
    with _environment():
        process.start()
    there.close()

    def write(prompts: list[list[int]]) -> Written:
        here.send(prompts)
        return here.recv()

    try:
        here.recv()  # that it is ready
        yield write
    finally:
        with suppress(OSError):  # a process that has died says why itself
            here.send(None)
        process.join(60)
        process.terminate()


@contextmanager
def _environment() -> Iterator[None]:
    """As vLLM's pages advise for a CPU: its OpenMP, where its package brought it, and all cores; the engine in the
    process that asks it, since a worker of its own would watch for work without a pause."""
    before = dict(os.environ)
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.is_file():
        os.environ["LD_PRELOAD"] = str(library)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _engine_process(pipe, target: str, speculative: dict | None, args) -> None:
    """Answers prompts until it is given None."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=args.batch,
        speculative_config=speculative,
        enable_prefix_caching=False,  # the same prompts come again
        disable_log_stats=False,
        distributed_executor_backend="uni",
        enforce_eager=args.eager,
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_new_tokens)
    pipe.send("ready")
    while (prompts := pipe.recv()) is not None:
        before = counts(llm)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        steps, *accepted = (a - b for a, b in zip(counts(llm), before, strict=True))
        pipe.send(Written([list(output.outputs[0].token_ids) for output in outputs], steps, accepted))


def counts(llm) -> list[int]:
    """Steps of each text after its first token, summed so far; then drafted tokens accepted at each depth, if any are
    drafted. (The counter of drafts leaves out steps without one, which n-grams have.)"""
    found = {metric.name: metric for metric in llm.get_metrics()}
    accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return [found["vllm:inter_token_latency_seconds"].count, *(accepted.values if accepted else ())]


def in_turns(contenders: dict[str, Contender], blocks: list[list[list[int]]], repeats: int) -> dict[str, list]:
    """(Written, seconds) of each contender for each block, `repeats` times over; who comes first changes."""
    names = list(contenders)
    for name in names:
        contenders[name](blocks[0])  # what is compiled and allocated once
    found: dict[str, list] = {name: [] for name in names}
    for turn in range(repeats * len(blocks)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(_PAUSE)
            began = time.perf_counter()
            written = contenders[name](blocks[turn % len(blocks)])
            found[name].append((written, time.perf_counter() - began))
    return found


def rows_of(found: dict[str, list], blocks: int) -> Iterator[dict]:
    """A row a contender: tokens, rounds and counts of one pass over the blocks, times of all; no times where a text is
    not plain vLLM's."""
    truth = [text for written, _ in found[PLAIN] for text in written.tokens]
    for name, calls in found.items():
        one = [written for written, _ in calls[:blocks]]
        texts = [text for written in one for text in written.tokens]
        same = [text == want for text, want in zip((t for w, _ in calls for t in w.tokens), truth, strict=True)]
        rounds, tokens = sum(written.rounds for written in one), sum(map(len, texts))
        row = {
            "contender": name,
            "texts": len(texts),
            "texts_equal": sum(same[: len(texts)]),
            "tokens": tokens,
            "rounds": rounds,
            "accepted_by_depth": [sum(counts) for counts in zip(*(written.accepted for written in one), strict=True)],
            "tokens_per_round": round((tokens - len(texts)) / max(rounds, 1), 4),
        }
        yield row | (times_of(calls, found[PLAIN]) if all(same) else {"tokens_per_second": None, "ratio": None})


def times_of(calls: list, plain: list) -> dict:
    """Tokens a second, and the ratio to plain vLLM's of the same block in the same turn: median, 20 and 80 percent."""
    speeds = speeds_of(calls)
    ratios = [mine / theirs for mine, theirs in zip(speeds, speeds_of(plain), strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5) if len(ratios) > 1 else ratios * 2
    ratio = {"low": low, "median": statistics.median(ratios), "high": high}
    return {
        "tokens_per_second": round(statistics.median(speeds), 2),
        "ratio": {name: round(value, 3) for name, value in ratio.items()},
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
    with ExitStack() as engines:
        made = {name: engines.enter_context(vllm_engine(model, how, args)) for name, how in speculative.items()}
        return in_turns(made | contenders, blocks, args.repeats)


if __name__ == "__main__":
    main()
