"""Half an hour on a machine with one GPU and no network, as a few commands of less than ten minutes each:

    bench/gpu/call.sh carry RESULTS     only take in what came along
    bench/gpu/call.sh kernels RESULTS   build, smoke, tests, the benchmarks that matter most
    bench/gpu/call.sh answers RESULTS   setup, answers, search
    bench/gpu/call.sh draft RESULTS     setup, train, evaluate
    bench/gpu/call.sh rest RESULTS      setup, speed with the new draft, all benchmarks, tuning

What came along lies in the folder kit: parts of the kit and what earlier calls brought back, in any number of calls.
The steps work in --work, which can stay on the machine. After each of them, what is to be brought back is in RESULTS:
at most 8 files of less than 16 MiB, among them results.tgz with all logs and small files. A step that fails or takes
too long stops nothing, and the same command again goes on. docs/gpu.md has the whole sequence.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from beagle_sd.files import whole
from bench.gpu import HEADLINES
from bench.processes import ROOT, end_on_signals, run

SECONDS = 570.0
LEAST = 20.0
"""A step with fewer seconds left does not begin."""
FILES = 8
"""Of RESULTS."""
SAVING = 20.0
"""Seconds of a step that are not its command's own: to end it and to save what it has."""
FOLDERS = {
    "kit.*": "in",
    "answers-*.npz": "out/answers",
    "model.safetensors": "out/train/draft",
    "checkpoint.part*": "out/train/checkpoint",
}
"""Where in the work folder what is carried lies; beside it there is RESULTS_FILE, with all the rest."""
TOGETHER = ("checkpoint.part*",)
"""Of no use one without the other."""
LEFT = ("in", "out/kit", "out/scratch")
"""Folders of the work folder that are not brought back."""
RESULTS_FILE = "results.tgz"
ANSWER_MINUTES, TRAIN_MINUTES = 4.8, 6.6


class Step(NamedTuple):
    """command(seconds) is what does it in so many; seconds: at most, of those that are left; lines: of its output that
    are shown."""

    name: str
    command: Callable[[float], list[str]]
    seconds: float = math.inf
    lines: int = 6


class Call(NamedTuple):
    """The steps, and which files of FOLDERS are brought back."""

    steps: list[Step]
    brought: tuple[str, ...] = ()


def calls(work: Path, dry: bool) -> dict[str, Call]:
    """Every call's steps by name; dry, on the CPU at toy size."""

    def check(*parts: str) -> Callable[[float], list[str]]:
        flags = ["--dry-run"] if dry else []
        return lambda seconds: [
            sys.executable,
            "-m",
            "bench.gpu.check",
            str(work / "gpu.json"),
            *parts,
            "--seconds",
            str(int(seconds - SAVING)),
            *flags,
        ]

    def train(part: str, minutes: float = math.inf, *more: str) -> Callable[[float], list[str]]:
        flags, most = (["--toy", "--device", "cpu"], 2.5) if dry else ([], minutes)
        return lambda seconds: [
            sys.executable,
            "-m",
            "bench.recipes.one_gpu",
            str(work / "out"),
            part,
            *more,
            *flags,
            "--minutes",
            f"{min(minutes, most, (seconds - SAVING) / 60):.2f}",
        ]

    def speed(seconds: float) -> list[str]:
        little = ["--count", "1", "--max-new-tokens", "4"] if dry else ["--count", "12", "--dtype", "bfloat16"]
        draft = work / "out" / "train" / "draft"
        return [
            sys.executable,
            "-m",
            "bench.answers.speed",
            "--target",
            _target(work),
            *little,
            *(["--draft", str(draft)] if draft.is_dir() else []),
            "--out",
            str(work / "speed.json"),
        ]

    setup = Step("setup", train("setup", math.inf, "--kit", str(work / "in")), 210)
    return {
        "carry": Call([]),
        "kernels": Call(
            [
                Step("build", check("build"), 165),
                Step("smoke", check("smoke"), 165, lines=45),
                Step("tests", check("tests"), 205, lines=25),
                Step("bench", check("round", *(f"bench:{name}" for name in HEADLINES)), lines=20),
            ]
        ),
        "answers": Call(
            [
                setup,
                Step("answers", train("answers", ANSWER_MINUTES), 60 * ANSWER_MINUTES + SAVING),
                Step("search", train("search"), lines=30),
            ],
            ("answers-*.npz",),
        ),
        "draft": Call(
            [
                setup,
                Step("train", train("train", TRAIN_MINUTES), 60 * TRAIN_MINUTES + SAVING, lines=20),
                Step("evaluate", train("evaluate"), lines=20),
            ],
            ("model.safetensors", "checkpoint.part*"),
        ),
        "rest": Call(
            [
                setup,
                Step("speed", speed, 170, lines=20),
                Step("ops", check("bench"), 200, lines=20),
                Step("tune", check("tune")),
            ]
        ),
    }


def _target(work: Path) -> str:
    """The kit's target as `load_target` takes it."""
    about = work / "out" / "kit" / "about.json"
    name = json.loads(about.read_text(encoding="utf-8"))["target"] if about.is_file() else "smollm2-135m"
    return str(about.parent / name) if name == "target" else name


def main(arguments: list[str]) -> int:
    """0 if every step passed."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu/call.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(calls(Path(), False))
    parser.add_argument("call", choices=names, metavar="CALL", help=", ".join(names))
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the folder that is brought back")
    parser.add_argument("--carried", type=Path, default=ROOT / "kit", help="what came along (default: kit)")
    parser.add_argument("--work", type=Path, default=Path.home() / "beagle-work", help="default: beagle-work at home")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps (default {SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="every step, on the CPU, at toy size")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    work, results = options.work.resolve(), options.results.resolve()
    (work / "log").mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    for taken in take_in(options.carried, work):
        print(f"taken in: {taken}")
    call, passed = calls(work, options.dry_run)[options.call], True
    for step in call.steps:
        seconds = min(step.seconds, ends - time.monotonic())
        if seconds < LEAST:
            print(f"== {step.name}: not begun, the time is up")
            passed = False
            continue
        log = work / "log" / f"{step.name}.txt"
        done = run(step.command(seconds), seconds, log, BEAGLE_CACHE=str(work / "out" / "scratch"))
        print(f"== {step.name}: {done['status']}, {done['seconds']:.0f} s")
        for output in (work / "gpu.logs" / log.name, log):  # the log of bench.gpu.check of a step, if it has one
            print(*_lines(output)[-step.lines :], sep="\n", flush=True)
        bring_back(work, results, call.brought)
        passed &= done["status"] == "passed"
        if "signal" in done:
            return 128 + done["signal"]
    return int(not passed)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def take_in(carried: Path, work: Path) -> Iterator[str]:
    """Put what came along where the steps look for it; what is there already stays as it is."""
    for path in sorted(carried.iterdir()) if carried.is_dir() else []:
        known = [work / folder / path.name for pattern, folder in FOLDERS.items() if fnmatch(path.name, pattern)]
        if path.name == RESULTS_FILE:
            with tarfile.open(path) as tar:
                new = [member for member in tar if member.isfile() and not (work / member.name).exists()]
                tar.extractall(work, new, filter="data")
            yield f"{len(new)} files of {path.name}"
        elif known and not known[0].exists():
            _copy(path, known[0])
            yield path.name


def bring_back(work: Path, results: Path, patterns: tuple[str, ...]) -> None:
    """Fill RESULTS: all small files as one, then those of `patterns`, as many as may be."""
    with whole(results / RESULTS_FILE) as partial, tarfile.open(partial, "w:gz") as tar:
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            name = path.relative_to(work)
            separate = any(fnmatch(path.name, pattern) for pattern in FOLDERS)
            if not separate and not any(name.is_relative_to(folder) for folder in LEFT):
                tar.add(path, name)
    room = FILES - 1
    for pattern in patterns:
        found = sorted((work / FOLDERS[pattern]).glob(pattern))
        fit = found[:room] if pattern not in TOGETHER or len(found) <= room else []
        if len(fit) < len(found):
            print(f"{len(found) - len(fit)} of {len(found)} files {pattern} stay in {work / FOLDERS[pattern]}")
        room -= len(fit)
        for path in fit:
            _copy(path, results / path.name)


def _copy(path: Path, to: Path) -> None:
    """Whole or not at all."""
    with whole(to) as partial:
        shutil.copyfile(path, partial)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main(sys.argv[1:]))
