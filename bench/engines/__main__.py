"""The same model's whole answers by the engines that people use on a CPU: python -m bench.engines FOLDER

FOLDER has what `python -m bench.engines.environments FOLDER` and `python -m bench.engines.models FOLDER` made. Each
contender is a process of its own, with the same cores and number of threads; each prompt is answered by all of them,
greedily, in an order that turns. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, GenerationConfig

from beagle_kernels.machine import processor
from beagle_sd.evaluation.comparison import read_prompts
from beagle_sd.files import write_json
from beagle_sd.models import smollm2
from beagle_sd.models.ends import token_ids
from bench.engines.comparison import rows_of
from bench.engines.contenders import BASELINE, Contender, chosen
from bench.engines.turns import Answer, Gone, Worker, answers_to
from bench.environment import commit
from bench.processes import end_on_signals

SETS = ("mt-bench", "humaneval", "gsm8k")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the environments and models")
    parser.add_argument("--contenders", nargs="+", default=["*"], metavar="PATTERN", help='such as "openvino*"')
    parser.add_argument("--prompts", nargs="+", default=SETS, help=f"{', '.join(SETS)} or files")
    parser.add_argument("--count", type=int, default=20, help="prompts of each")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a run for each number")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for engines-THREADS.json")
    args = parser.parse_args()
    contenders = chosen(args.contenders)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.converted())
    sets = {source: read_prompts(source, tokenizer, args.count) for source in dict.fromkeys(args.prompts)}
    end_on_signals()
    for threads in args.threads:
        result = measured(contenders, args.folder, sets, args.max_new_tokens, threads)
        for source in sets:
            Console(width=160).print(table(source, result["rows"]))
        if args.out:
            write_json(args.out / f"engines-{threads}.json", {"command": command(args), **result})


def command(args: argparse.Namespace) -> str:
    """What was asked for, without the folders of this machine."""
    lists = {"contenders": args.contenders, "prompts": args.prompts, "threads": args.threads}
    shown = {name: " ".join(f'"{each}"' if "*" in str(each) else str(each) for each in lists[name]) for name in lists}
    options = " ".join(f"--{name} {value}" for name, value in shown.items())
    return f"python -m bench.engines FOLDER {options} --count {args.count} --max-new-tokens {args.max_new_tokens}"


def measured(
    contenders: Sequence[Contender],
    folder: Path,
    sets: Mapping[str, list[list[int]]],
    new_tokens: int,
    threads: int,
) -> dict:
    """The whole record of a run with so many threads; RuntimeError where BASELINE cannot take part."""
    longest = max((prompt for prompts in sets.values() for prompt in prompts), key=len)
    run = {"threads": threads, "cpus": cpus(threads), "capacity": len(longest) + new_tokens, "ends": ends()}
    gone: dict[str, str] = {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = started(stack, contenders, folder, run, logs, gone)
        for name in workers:
            list(answers_to({name: workers[name]}, [longest, longest], new_tokens, gone))  # none of it is timed
            print(f"{name} is warm", flush=True)
        answers: dict[str, list[dict[str, Answer]]] = {}
        for source, prompts in sets.items():
            answers[source] = []
            for each in answers_to(workers, prompts, new_tokens, gone):
                answers[source].append(each)
                print(f"{threads} threads, {source}: {len(answers[source])} of {len(prompts)}", flush=True)
        idle = {name: worker.idle_share for name, worker in workers.items()}
    if BASELINE in gone:
        raise RuntimeError(f"{BASELINE}, with which all are compared, cannot take part: {gone[BASELINE]}")
    names = [each.name for each in contenders]
    rows = [row for source in sets for row in rows_of(source, answers[source], gone)]
    return {
        "threads": threads,
        "processor": processor(),
        "commit": commit(),
        "count": {source: len(prompts) for source, prompts in sets.items()},
        "max_new_tokens": new_tokens,
        "versions": {name: worker.versions for name, worker in workers.items()},
        "idle": idle,
        "rows": sorted(rows, key=lambda row: (list(sets).index(row["prompts"]), names.index(row["contender"]))),
    }


def started(
    stack: ExitStack, contenders: Sequence[Contender], folder: Path, run: dict, logs: Path, gone: dict[str, str]
) -> dict[str, Worker]:
    """The contenders' processes, loaded one after another; `gone` is told of those that cannot take part."""
    workers: dict[str, Worker] = {}
    for contender in contenders:
        try:
            if why := contender.why_not(folder):
                raise Gone(why)
            log = logs / f"{len(workers)}-{contender.module}"
            variables = contender.variables(run["threads"])
            workers[contender.name] = Worker(stack, contender.command(folder, run), variables, log)
            print(f"{contender.name}: {json.dumps(workers[contender.name].versions)}", flush=True)
        except Gone as error:
            gone[contender.name] = str(error)
            print(f"{contender.name}: {error}", flush=True)
    return workers


def cpus(threads: int) -> list[int]:
    """The cores of a run: as many as threads, of those that this process may use; ValueError if it may not."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads is {threads}; allowed here: 1 to {len(allowed)}")
    return allowed[:threads]


def ends() -> list[int]:
    """The tokens that end an answer of `target.generate`."""
    return token_ids(GenerationConfig.from_pretrained(smollm2.converted()).eos_token_id)


def table(source: str, rows: Sequence[dict]) -> Table:
    """The rows of one set of prompts, for the terminal."""
    shown = Table(title=source)
    for column in ("contender", "ms a token", "after the first", f"x {BASELINE} (bound)", "equal"):
        shown.add_column(column)
    for row in rows:
        if row["prompts"] != source:
            continue
        if "why" in row:
            shown.add_row(row["contender"], row["why"])
            continue
        over, decode = row["over"][BASELINE], row["decode_ms_per_token"]
        shown.add_row(
            row["contender"],
            f"{row['ms_per_token']:.1f}",
            "" if decode is None else f"{decode:.1f}",
            f"{over['median']:.2f} ({over['bound']})",
            f"{row['equal']} of {row['answers']}",
        )
    return shown


if __name__ == "__main__":
    main()
