"""Build for the GPU at hand, try every kernel, run the tests that need one, measure everything, and write one JSON.

Run it as `bench/gpu/check.sh [OUT [PART ...]]`; parts: build, smoke, tests, round, bench, tune, speed, or a single
benchmark as bench:verify_tree. "ours" are those that matter most without their peers, "peers" the same with them;
ours:round and ours:verify_tree are one without; "tune:first" tunes only the tiles of those figures. Without a part all
of them are run, those figures first. A step that fails or takes too long is recorded with what it has until then, and
the next one runs; none begins when the time is up. OUT is written after every step; the whole output of the steps and
their own files are in the folder OUT.logs beside it. A run into the same OUT with the same sources on the same GPU
repeats no step that is there and passed, and no benchmark's rows that are there, so calling it again goes on; only
where tuning has found other tiles meanwhile are the benchmarks of their kernels measured again. --dry-run walks every
step on the CPU at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beagle_sd.files import write_json
from bench.__main__ import MODULES
from bench.environment import environment, native_arch
from bench.gpu import HEADLINES, PEERS, TILED, figures, run_tests
from bench.processes import GRACE, end_on_signals, run
from bench.tuning import label

SECONDS = {"build": 240, "smoke": 150, "tests": 240, "round": 180, "bench": 200, "tune": 240, "speed": 120}
SECONDS |= {"ours": 130, "tune:first": 110}
"""A step's time limit, by its name or its kind."""
WITHOUT_PEERS = "passed without peers"
OPS = tuple(name for name in MODULES if name != "round")
ALL = 530
"""Seconds after which no step goes on, unless --seconds says otherwise: a run ends within nine minutes."""
LEAST = 15
"""A step that has fewer seconds left does not begin."""


class Steps:
    """Each part's step, on a GPU or, dry, at a tiny size on the CPU; their files are in the folder `logs`."""

    def __init__(self, dry: bool, record: dict, logs: Path):
        self.dry, self.record, self.logs = dry, record, logs
        self.device = ["--device", "cpu" if dry else "cuda"]

    def build(self, name: str, seconds: float) -> dict:
        """The extension, in place, for this GPU alone."""
        chosen = {"BEAGLE_CUDA": "0"} if self.dry else {"BEAGLE_CUDA": "1", "BEAGLE_CUDA_ARCHS": native_arch()}
        # setup.py takes fewer where memory is little, and a virtual machine's can grow only as it is used
        chosen |= {"MAX_JOBS": os.environ.get("MAX_JOBS") or str(cores())}
        return run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, self.logs / "build.txt", **chosen)

    def smoke(self, name: str, seconds: float) -> dict:
        """Every kernel once, each check in a process of its own."""
        log = self.logs / "smoke.txt"
        done = run([sys.executable, "-m", "bench.smoke", *self.device], seconds, log)
        counted = re.findall(r"(\d+) of (\d+) passed", log.read_text(errors="replace"))
        return done | ({"counts": dict(zip(("passed", "checks"), map(int, counted[-1])))} if counted else {})

    def tests(self, name: str, seconds: float) -> dict:
        """The tests that need a GPU, counted by file, also where they were stopped; dry, they are only collected."""
        report = self.logs / "tests.xml"
        report.unlink(missing_ok=True)
        options, missing = run_tests.options()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "-rfE",
            "--durations=20",
            *run_tests.CHOSEN,
            *options,
        ]
        command += ["--collect-only"] if self.dry else [f"--junitxml={report}"]
        done = run([*command, *run_tests.files()], seconds, self.logs / "tests.txt")
        if missing:
            done["left out"] = missing
        if report.exists():
            done["files"] = run_tests.counted(report)
            done["counts"] = {kind: sum(file[kind] for file in done["files"].values()) for kind in run_tests.KINDS}
            if done["status"] == "passed" and not done["counts"]["passed"]:
                done["status"] = "failed: nothing ran"
        return done

    def tune(self, name: str, seconds: float) -> dict:
        """The fastest tiles and what they gain over the shipped ones; benchmarks that follow measure with them."""
        found = self.logs / "tune.json"
        command = [sys.executable, "-m", "bench.tuning", *self.device, str(found), "--go-on"]
        done = run([*command, *(["--first"] if name else [])], seconds, self.logs / "tune.txt")
        return done | {"configs": read(found, [])}

    def tiles(self) -> list[dict]:
        """What tuning has found so far."""
        return read(self.logs / "tune.json", [])

    def bench(self, name: str, seconds: float, peers: bool = True) -> dict:
        """One op's rows, each with its share of the machine's limits; goes on from the rows of a stopped step."""
        if not self.record.get("limits") and not self.dry:
            self.record["limits"] = self._limits()
        file, tiles = self.logs / f"bench-{name}.json", self.logs / "tiles.json"
        command = [sys.executable, "-m", "bench", name, *self.device, "--json", str(file), "--go-on"]
        of_step, of_rows = {}, {}
        if name in TILED:
            write_json(tiles, self.tiles())
            command += ["--tuned", str(tiles)]
            # rows of a step that was stopped can be of those before
            of_step, of_rows = {"tiles": label(self.tiles()) or "shipped"}, {"tiles": "shipped"}
        command += [*(["--size", "tiny"] if self.dry else []), *([] if peers else ["--without-peers"])]
        done = run(command, seconds, self.logs / f"bench-{name}.txt")
        rows = [of_rows | with_shares(row, self.record.get("limits", {})) for row in read(file, [])]
        return done | of_step | {"counts": {"numbers": sum("p50" in row for row in rows)}, "rows": rows}

    def round(self, name: str, seconds: float) -> dict:
        """Whole rounds of an 8B-shaped target, acceptance replayed."""
        return self.bench("round", seconds)

    def ours(self, name: str, seconds: float) -> dict:
        """A benchmark without its peers, which take most of its time."""
        done = self.bench(name, seconds, peers=False)
        return done | ({"status": WITHOUT_PEERS} if done["status"] == "passed" else {})

    def speed(self, name: str, seconds: float) -> dict:
        """Whole answers of the bundled draft, where its target and the prompts are."""
        if why := why_no_answers():
            return {"status": "skipped", "why": why}
        found = self.logs / "speed.json"
        found.unlink(missing_ok=True)
        little = ["--count", "1", "--max-new-tokens", "4"] if self.dry else ["--count", "4", "--dtype", "bfloat16"]
        command = [sys.executable, "-m", "bench.answers.speed", *little, "--out", str(found)]
        done = run(command, seconds, self.logs / "speed.txt")
        return done | {"found": read(found, [])}

    def _limits(self) -> dict[str, float]:
        """The machine's, measured in a process that gives the GPU back."""
        found = self.logs / "limits.json"
        done = run([sys.executable, "-m", "bench.timing", str(found)], 60, self.logs / "limits.txt")
        print(f"limits: {done['status']}", flush=True)
        return read(found, {})


def read(file: Path, otherwise):
    """What a step wrote, `otherwise` where it wrote nothing."""
    return json.loads(file.read_text()) if file.exists() and file.stat().st_size else otherwise


def why_no_answers() -> str | None:
    """What bench.answers.speed lacks here, None where nothing: it needs SmolLM2 and prompts; nothing is downloaded."""
    from beagle_sd.data.evaluation_sets import evaluation_prompts
    from beagle_sd.models.smollm2 import converted

    try:
        converted()
        evaluation_prompts("mt-bench", download=False)
    except (FileNotFoundError, ImportError) as error:
        return str(error)
    return None


def with_shares(row: dict, limits: dict) -> dict:
    """The row, and what part of the copy bandwidth and of the matmul rate its own rates are."""
    names = {"byte/s": "share of copy", "flop/s": "share of matmul"}
    return row | {names[unit]: row[unit] / limit for unit, limit in limits.items() if unit in row}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def steps(parts: list[str]) -> list[str]:
    """The parts' steps by name, in the order to run them; without parts, of all."""
    ours = [f"ours:{name}" for name in HEADLINES]
    peers = [name if name == "round" else f"bench:{name}" for name in PEERS]
    rest = [f"bench:{name}" for name in OPS if name not in PEERS]
    if not parts:
        return ["build", "smoke", "ours:round", "tune:first", *ours, "tests", *peers, "tune", *rest, "speed"]
    benches = [step for step in peers if step != "round"] + rest
    several = {"ours": ours, "peers": peers, "bench": benches}
    return [step for part in parts for step in several.get(part, [part])]


def entry_of(step: str) -> str:
    """Under which name the record has a step: a benchmark without its peers under the whole one's."""
    kind, _, name = step.partition(":")
    return step if kind != "ours" else name if name == "round" else f"bench:{name}"


def is_done(step: str, record: dict, tiles: list[dict]) -> bool:
    """Whether the record has it: what was measured with other tiles than the present ones is to be measured again."""
    found, now = record["steps"].get(entry_of(step), {}), label(tiles) or "shipped"
    if step == "build" or found.get("tiles", now) != now:
        return False
    return found.get("status") in ("passed", *([WITHOUT_PEERS] if step.startswith("ours:") else []))


def main(arguments: list[str]) -> int:
    """Run the parts; the exit status is 0 unless a step failed or found no time, and without a GPU."""
    options = parsed(arguments)
    now, ends = environment() | {"dry_run": options.dry_run}, time.monotonic() + options.seconds
    out = options.out.resolve()
    logs = out.with_suffix(".logs")
    before = read(out, {})
    if any(before.get("environment", {}).get(name) != now[name] for name in ("sources", "gpu", "dry_run")):
        before = set_aside(out, logs)
    record = {**before, "environment": now, "steps": before.get("steps", {})}
    logs.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    wanted, make = steps(options.parts), Steps(options.dry_run, record, logs)
    done: dict[str, Any]
    for step in wanted:
        kind, entry = step.partition(":")[0], entry_of(step)
        if is_done(step, record, make.tiles()):
            continue
        if now["gpu"] is None and not options.dry_run:
            done = {"status": "skipped", "why": "torch finds no CUDA device"}
        elif (left := ends - time.monotonic()) < LEAST:
            over = f"not begun: the {options.seconds:.0f} s were over; run it again to go on"
            done = record["steps"].get(entry, {}) | {"status": over}
        else:
            most = SECONDS.get(step, SECONDS[kind]) * (2 if options.dry_run else 1)  # a CPU of few cores is slower
            done = result_of(make, step, min(most, left - GRACE))
        record["steps"][entry] = done
        counts = ", ".join(f"{count} {kind}" for kind, count in done.get("counts", {}).items() if count)
        print(f"{step}: {done['status']}, {done.get('seconds', 0):.0f} s {done.get('why', counts)}", flush=True)
        write_json(out, record)
        if done.get("rows") and "not begun" not in done["status"]:
            print(*figures.lines(done["rows"]), sep="\n", flush=True)
        if "signal" in done:
            return 128 + done["signal"]
    if now["gpu"] is None and not options.dry_run:
        print(f"no GPU: {out} holds no numbers")
        return 0
    passed = ("passed", "skipped", WITHOUT_PEERS)
    return int(any(record["steps"][entry_of(step)]["status"] not in passed for step in wanted))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; what is not allowed ends the process as argparse does."""
    allowed = [*SECONDS, "peers", *(f"{kind}:{name}" for kind in ("bench", "ours") for name in OPS), "ours:round"]
    parser = argparse.ArgumentParser(
        prog="bench/gpu/check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(allowed))
    parser.add_argument("--seconds", type=float, default=ALL, help=f"for the whole run (default {ALL})")
    parser.add_argument("--dry-run", action="store_true", help="every step, on the CPU, at a tiny size")
    options = parser.parse_intermixed_args(arguments)
    for part in options.parts:
        if part not in allowed:
            parser.error(f"part {part!r}; allowed: {', '.join(allowed)}")
    return options


def set_aside(out: Path, logs: Path) -> dict:
    """Keep another run's record and logs beside the new ones, one run back."""
    for path in (out, logs):
        if path.exists():
            kept = path.with_name(f"{path.stem}.before{path.suffix}")
            shutil.rmtree(kept, ignore_errors=True)
            path.replace(kept)
    return {}


def result_of(make: Steps, step: str, seconds: float) -> dict[str, Any]:
    """A step's result, whatever happens in it."""
    kind, _, name = step.partition(":")
    begin: Callable[[str, float], dict] = getattr(make, kind)
    try:
        return begin(name, seconds)
    except Exception as error:  # a step's failure leaves the others their turn
        return {"status": f"failed: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main(sys.argv[1:]))
