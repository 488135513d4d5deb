"""Train, choose and measure a draft on a machine with one GPU and no internet, in parts of a few minutes.

    bench/recipes/one_gpu.sh kit FOLDER                 where there is internet: what to carry, in parts of 46 MiB
    bench/recipes/one_gpu.sh OUT setup --kit FOLDER     join it, build the extension, convert the target, try all ops
    bench/recipes/one_gpu.sh OUT answers                the target writes answers to the prompts
    bench/recipes/one_gpu.sh OUT search                 short runs that settle the recipe
    bench/recipes/one_gpu.sh OUT train                  stage 1, then stage 2, states computed live
    bench/recipes/one_gpu.sh OUT evaluate               MT-Bench, HumanEval, GSM8K: chain, 16 and 60 nodes, T = 0 and 1
    bench/recipes/one_gpu.sh OUT eagle2                 EAGLE-2's head and ours on the same answers, in one run

A part ends before its --minutes, and goes on where it stopped when it is run again, also after a kill. What it made is
in OUT/PART, in files of less than 16 MiB: put those into the OUT of another machine to go on there. Several parts may
be named: they run one after the other, each in a process of its own and with its own minutes, whatever became of the
one before. docs/gpu.md has the whole sequence.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.processes import ROOT, Ended, end_on_signals, interrupted, started

PARTS = ("setup", "answers", "search", "train", "evaluate", "eagle2")
DONE, FAILED, WRONG, MORE = 0, 1, 2, 3
"""The exit status: also of several parts, where FAILED or WRONG comes before MORE."""
LATE, GRACE = 60.0, 15.0
"""Seconds after its minutes at which a part that has not ended is ended, and those that it then has to save."""


def main(arguments: list[str]) -> int:
    """0 when the parts are done, 3 when one ran out of time and wants to be run again, 2 for what a user can mend, 1
    for a part that crashed."""
    began = time.monotonic()
    if arguments[:1] == ["kit"]:
        return kit(arguments[1:])
    options = parsed(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return run_part(options, began) if len(options.parts) == 1 else run_parts(options)


def run_parts(options: argparse.Namespace) -> int:
    """Each part in a process of its own: one that crashes takes nothing with it but its own work."""
    given = {name: value for name, value in vars(options).items() if name not in ("out", "parts")}
    flags = [
        word
        for name, value in given.items()
        if value not in (None, False)
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    ends = []
    for part in options.parts:
        code = in_process([str(options.out), part, *flags], 60 * options.minutes + LATE)
        if code not in (DONE, FAILED, WRONG, MORE):
            how = "its time ran out and it had to be ended" if code is None else f"it ended with {code}"
            print(f"{part}: {how}", file=sys.stderr)
        ends.append(code if code in (DONE, WRONG, MORE) else FAILED)
    return next((end for end in (FAILED, WRONG, MORE) if end in ends), DONE)


def in_process(arguments: list[str], seconds: float) -> int | None:
    """This script with `arguments`: its exit status, None where it had to be ended."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "bench.recipes.one_gpu", *arguments]
    with started(command, PYTHONPATH=os.pathsep.join(paths)) as process:
        try:
            return process.wait(seconds)
        except (subprocess.TimeoutExpired, Ended) as stop:
            interrupted(process, GRACE)
            if isinstance(stop, Ended):
                raise
    return None


def run_part(options: argparse.Namespace, began: float) -> int:
    """The only part named, in this process. began: when the process did."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from beagle_sd.training.trainer import TrainingStopped
    from bench.recipes.one_gpu.answers import answers
    from bench.recipes.one_gpu.eagle2 import eagle2
    from bench.recipes.one_gpu.evaluate import evaluate
    from bench.recipes.one_gpu.job import Budget, Job, OutFolder
    from bench.recipes.one_gpu.recipe import TOY, Sizes
    from bench.recipes.one_gpu.search import search
    from bench.recipes.one_gpu.setup import setup
    from bench.recipes.one_gpu.train import train

    sizes = TOY if options.toy else Sizes()
    if options.batch is not None:
        sizes = replace(sizes, batch=options.batch)
    os.environ["BEAGLE_CACHE"] = str(options.out / "scratch")  # target and prompts stay out of the user's cache
    sys.path.insert(0, str(options.out / "kit" / "site"))
    parts: dict[str, Callable[[Job], bool]] = {
        "setup": lambda job: setup(job, options.kit.resolve()),
        "answers": lambda job: answers(job, graph=not options.no_graph),
        "search": search,
        "train": lambda job: train(job, options.train_minutes),
        "evaluate": evaluate,
        "eagle2": eagle2,
    }
    disable_progress_bar()
    part = options.parts[0]
    budget = Budget(options.minutes, time.monotonic() - began)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        done = parts[part](Job(OutFolder(options.out), sizes, budget, device))
    except (FileNotFoundError, ValueError, TrainingStopped) as error:
        print(f"{part}: {error}", file=sys.stderr)
        return WRONG
    end = "done" if done else "out of time: run it again to go on"
    print(f"{part}: {end} ({budget.spent:.0f} s)")
    return DONE if done else MORE


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; what is not allowed ends the process as argparse does."""
    parser = argparse.ArgumentParser(
        prog="bench/recipes/one_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to work in")
    parser.add_argument("parts", nargs="+", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="a part's time (default 8.5)")
    parser.add_argument("--train-minutes", type=float, help="plan train for so many minutes, over several runs of it")
    parser.add_argument("--kit", type=Path, help="folder with the kit's parts, for setup")
    parser.add_argument("--batch", type=int, help="answers written at a time (default 1024)")
    parser.add_argument("--no-graph", action="store_true", help="write answers without CUDA graphs")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the parts on a CPU")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"part {part!r}; allowed: {', '.join(PARTS)}")
    for name in ("minutes", "train_minutes", "batch"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed: above 0")
    if "setup" in options.parts and options.kit is None:
        parser.error("setup needs --kit FOLDER, which `bench/recipes/one_gpu.sh kit FOLDER` makes")
    return options


def kit(arguments: list[str]) -> int:
    """0 when the kit is made, 2 for what a user can mend."""
    options = parsed_kit(arguments)
    from bench.recipes.one_gpu import kit as gpu_kit

    try:
        gpu_kit.make(**vars(options))
    except (FileNotFoundError, ValueError) as error:
        print(f"kit: {error}", file=sys.stderr)
        return 2
    return 0


def parsed_kit(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/recipes/one_gpu.sh kit", description="Gather what a machine without internet needs, in parts."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--target", default="smollm2-135m", help="smollm2-135m, or a model's folder")
    parser.add_argument("--count", type=int, default=60000, help="training prompts (default 60000)")
    parser.add_argument("--seed", type=int, default=11, help="of the prompts (default 11)")
    parser.add_argument("--part-mib", type=int, default=46, help="largest file, in MiB (default 46)")
    parser.add_argument("--sources", nargs="+", help="default: all that can be had")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main(sys.argv[1:]))
