"""Half an hour on a machine with one GPU and no network, as a few commands of less than ten minutes each:

    bench/gpu/call.sh carry RESULTS     only take in what came along
    bench/gpu/call.sh kernels RESULTS   build, smoke, figures that matter most with tuned tiles, peers, tests
    bench/gpu/call.sh bench RESULTS     the same without smoke and tests
    bench/gpu/call.sh answers RESULTS   setup, answers, what `kernels` left of peers and tests
    bench/gpu/call.sh draft RESULTS     setup, train, evaluate
    bench/gpu/call.sh rest RESULTS      setup, speed with the new draft, tuning, all benchmarks, search

What came along lies in the folder kit: parts of the kit and what earlier calls brought back, in any number of calls.
The steps work in --work, which can stay on the machine. After each of them, and while they last, what is to be brought
back is put into RESULTS: at most 8 files of less than 16 MiB, 60 MiB together, among them results.tgz with all logs and
small files. A step that fails or takes too long stops nothing, and the same command again goes on. What is printed fits
into 12,000 characters. docs/gpu.md has the whole sequence.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from beagle_sd.files import name_in_the_end, whole
from bench.environment import commit
from bench.processes import ROOT, end_on_signals, run
from bench.report import bars

SECONDS = 560.0
LEAST = 20.0
"""A step with fewer seconds left does not begin, unless it says otherwise."""
FILES, A_FILE, TOGETHER_BYTES = 8, 16 << 20, 60 << 20
"""Of RESULTS: how many, and of what sizes."""
SAVING = 20.0
"""Seconds of a step that are not its command's own: to end it and to save what it has."""
EVERY = 45.0
"""Seconds after which a step that goes on is brought back as far as it has come."""
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
ANSWER_MINUTES, TRAIN_MINUTES = 3.4, 6.6
FIGURES = ("kernels", "bench", "answers", "rest")
"""Calls that end with what was asked of the figures, and what came of it."""
EVALUATION, TESTS = 130.0, 130.0
"""Seconds of these steps, which the ones before them leave."""


class Step(NamedTuple):
    """command(seconds) is what does it in so many; seconds: at most, of those that are left after `leaves` for the
    steps behind it; least: with fewer it does not begin; shown: as many characters of the end of its output."""

    name: str
    command: Callable[[float], list[str]]
    seconds: float = math.inf
    leaves: float = 0.0
    least: float = LEAST
    shown: int = 600


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
        little = ["--count", "1", "--max-new-tokens", "4"] if dry else ["--count", "6", "--dtype", "bfloat16"]
        little += ["--trees", "4,6,16", "6,10,60"]
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
    slower = 2 if dry else 1  # the CPU that it is tried on may have few cores
    build = Step("build", check("build"), 165 * slower, shown=300)
    peers, tests = Step("peers", check("peers"), shown=1600), Step("tests", check("tests"), least=60, shown=1200)
    answers = Step("answers", train("answers", ANSWER_MINUTES), 60 * ANSWER_MINUTES + SAVING)
    training = Step("train", train("train", TRAIN_MINUTES), 60 * TRAIN_MINUTES + SAVING, EVALUATION, shown=1500)
    # a kernel that is broken is to be seen first; tests beside a benchmark would spoil its times
    smoke = Step("smoke", check("smoke"), 165 * slower, shown=1600)
    return {
        "carry": Call([]),
        "kernels": Call(
            [build, smoke, Step("figures", check("ours:round", "tune:first", "ours"), shown=3600), peers, tests]
        ),
        "bench": Call(
            [build, Step("figures", check("tune:first", "ours:round", "ours"), shown=3600), peers._replace(shown=4500)]
        ),
        "answers": Call([setup, answers, peers._replace(leaves=TESTS, shown=4500), tests], ("answers-*.npz",)),
        "draft": Call(
            [setup, training, Step("evaluate", train("evaluate"), shown=2500)],
            ("model.safetensors", "checkpoint.part*"),
        ),
        "rest": Call(
            [
                setup,
                Step("speed", speed, 120, shown=2000),
                Step("tune", check("tune"), 150, shown=800),
                Step("ops", check("bench"), 220, shown=3300),
                Step("search", train("search"), least=60, shown=1200),
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
    parser.add_argument("--began", type=float, help="when they began, in seconds of the epoch (default: now)")
    parser.add_argument("--dry-run", action="store_true", help="every step, on the CPU, at toy size")
    options = parser.parse_args(arguments)
    late = 0.0 if options.began is None else max(0.0, time.time() - options.began)
    ends = time.monotonic() + options.seconds - late
    work, results = options.work.resolve(), options.results.resolve()
    (work / "log").mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    if commit() is None:
        print("no git here: what is measured names no commit unless BEAGLE_COMMIT does")
    for taken in take_in(options.carried, work):
        print(f"taken in: {taken}")
    call, passed = calls(work, options.dry_run)[options.call], True
    for step in call.steps:
        seconds = min(step.seconds, ends - time.monotonic() - step.leaves)
        if seconds < step.least:
            print(f"== {step.name}: not begun, the time is up")
            passed = False
            continue
        log = work / "log" / f"{step.name}.txt"
        with keeping(work, results, call.brought):
            done = run(step.command(seconds), seconds, log, BEAGLE_CACHE=str(work / "out" / "scratch"))
        print(f"== {step.name}: {done['status']}, {done['seconds']:.0f} s")
        # the log of bench.gpu.check of a step, if it has one
        output = "\n".join(filter(None, map(_text, (work / "gpu.logs" / log.name, log))))
        print(output[-step.shown :], *bring_back(work, results, call.brought), sep="\n", flush=True)
        passed &= done["status"] == "passed"
        if "signal" in done:
            return 128 + done["signal"]
    record = work / "gpu.json"
    if options.call in FIGURES and record.is_file():
        print("", *bars.lines(json.loads(record.read_text(encoding="utf-8"))), sep="\n")
    return int(not passed)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


@contextmanager
def keeping(work: Path, results: Path, patterns: tuple[str, ...]) -> Iterator[None]:
    """Bring back again and again while the block runs: where this process is killed with its step, RESULTS has what
    the step had written by then."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(EVERY):
            with suppress(OSError):  # a file that is just being written, or has gone
                bring_back(work, results, patterns)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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


def bring_back(work: Path, results: Path, patterns: tuple[str, ...]) -> list[str]:
    """Fill RESULTS: all small files as one, then those of `patterns`, in that order as many as may be. Returns what
    stays behind, in words."""
    with whole(results / RESULTS_FILE) as partial, tarfile.open(partial, "w:gz") as tar:
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            name = path.relative_to(work)
            separate = any(fnmatch(path.name, pattern) for pattern in FOLDERS) or name_in_the_end(path) != path
            if not separate and not any(name.is_relative_to(folder) for folder in LEFT):
                tar.add(path, name)
    files, room = FILES - 1, TOGETHER_BYTES - (results / RESULTS_FILE).stat().st_size
    remarks = []
    for pattern in patterns:
        found = sorted((work / FOLDERS[pattern]).glob(pattern))
        fit: list[Path] = []
        for path in found:
            if len(fit) < files and path.stat().st_size <= min(A_FILE, room - sum(map(_size, fit))):
                fit.append(path)
        if pattern in TOGETHER and len(fit) < len(found):
            fit = []
        if left := [path for path in found if path not in fit]:
            remarks.append(f"{len(left)} of {len(found)} files {pattern} stay in {work / FOLDERS[pattern]}")
        for path in left:  # one that fitted before is not of the same state as the rest
            (results / path.name).unlink(missing_ok=True)
        files, room = files - len(fit), room - sum(map(_size, fit))
        for path in fit:
            _copy(path, results / path.name)
    return remarks


def _size(path: Path) -> int:
    return path.stat().st_size


def _copy(path: Path, to: Path) -> None:
    """Whole or not at all."""
    with whole(to) as partial:
        shutil.copyfile(path, partial)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main(sys.argv[1:]))
