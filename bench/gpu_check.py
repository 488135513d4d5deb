"""Build for the GPU at hand, run the tests that need one, tune the tiles, measure everything, and write one JSON.

Run it as `bench/gpu_check.sh [OUT [PART ...]]`; parts: build, tests, tune, bench, round, speed, or a single one as
bench:verify_tree. A step that fails or takes too long is recorded and the next one runs; none begins when the time is
up. OUT is written after every step; a run into the same OUT at the same commit (BEAGLE_COMMIT, or git's) repeats no
step that is there and passed, so calling it again goes on. --dry-run walks every step on the CPU at a tiny size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.__main__ import FILES

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"build": 240, "tests": 150, "tune": 240, "bench": 150, "round": 180, "speed": 120}
"""A step's time limit."""
OPS = tuple(name for name in FILES if name != "round")
ALL = 530
"""Seconds after which no step goes on, unless told otherwise: a run ends within nine minutes."""
LEAST = 15
"""A step that has fewer seconds left does not begin."""
TAIL = 3000


def command_output(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """The checkout's commit, "-dirty" where files differ from it."""
    return os.environ.get("BEAGLE_COMMIT") or command_output("git", "describe", "--always", "--abbrev=40", "--dirty")


def environment() -> dict:
    """What the numbers were taken on."""
    found = {"commit": commit(), "python": sys.version.split()[0], "torch": torch.__version__, "gpu": None}
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    found["nvcc"] = command_output(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc", "-V")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "arch": native_arch(), "memory": gpu.total_memory, "l2": gpu.L2_cache_size}
        found["driver"] = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def native_arch() -> str:
    """The GPU's architecture as nvcc writes it, with Hopper's own instructions."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def run(command: list[str], seconds: float, **variables: str) -> dict:
    """One step in a process of its own: its status, and the end of its output where it did not pass."""
    start = time.monotonic()
    # to a file: a worker that outlives the command would keep a pipe open
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {seconds:.0f} s"
        log.seek(0)
        said = {} if status == "passed" else {"output": log.read()[-TAIL:]}
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **said}


class Steps:
    """Each part's step, on a GPU or, dry, at a tiny size on the CPU."""

    def __init__(self, dry: bool, record: dict):
        self.dry, self.record = dry, record
        self.device = ["--device", "cpu" if dry else "cuda"]
        self.limits: dict[str, float] = {}

    def build(self, name: str, seconds: float) -> dict:
        """The extension, in place, for this GPU alone."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if self.dry:
            return run(command, seconds, BEAGLE_CUDA="0")
        return run(command, seconds, BEAGLE_CUDA="1", BEAGLE_CUDA_ARCHS=native_arch())

    def tests(self, file: str, seconds: float) -> dict:
        """The tests of one file that need a GPU, counted; dry, they are only collected."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", file]
            done = run([*command, "--collect-only"] if self.dry else command, seconds)
            if report.exists() and not self.dry:
                counts = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
                done |= {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
        if self.dry and done["status"] == "failed with 5":  # a file that skips itself without a GPU
            done = {"status": "passed", "seconds": done["seconds"]}
        if not self.dry and done["status"] == "passed" and done.get("tests", 0) == done.get("skipped", 0):
            done["status"] = "failed: nothing ran"
        return done

    def tune(self, name: str, seconds: float) -> dict:
        """The fastest tiles and what they gain over the shipped ones; `bench` measures with them."""
        done, configs = self._with_json([sys.executable, "-m", "bench.tuning", *self.device], seconds)
        return done | {"configs": configs}

    def bench(self, name: str, seconds: float) -> dict:
        """One op's rows, each with its share of the machine's limits."""
        if not self.limits and not self.dry:
            self.limits = measured_limits()
        configs = self.record["steps"].get("tune", {}).get("configs") or []
        with tempfile.NamedTemporaryFile("w", suffix=".json") as tuned:
            json.dump(configs, tuned)
            tuned.flush()
            command = [sys.executable, "-m", "bench", name, *self.device, *(["--tuned", tuned.name] if configs else [])]
            done, rows = self._with_json([*command, *(["--size", "tiny"] if self.dry else [])], seconds, "--json")
        return done | {"limits": self.limits, "tuned": bool(configs),
                       "rows": [with_shares(row, self.limits) for row in rows]}  # fmt: skip

    def round(self, name: str, seconds: float) -> dict:
        """Whole rounds of an 8B-shaped target, acceptance replayed."""
        return self.bench("round", seconds)

    def speed(self, name: str, seconds: float) -> dict:
        """Whole answers of the bundled draft, where its target and the prompts are."""
        if why := why_no_answers():
            return {"status": "skipped", "why": why}
        little = ["--count", "1", "--max-new-tokens", "4"] if self.dry else ["--count", "4", "--dtype", "bfloat16"]
        done, found = self._with_json([sys.executable, "-m", "bench.speed", *little], seconds, "--out")
        return done | {"found": found}

    def _with_json(self, command: list[str], seconds: float, option: str = "") -> tuple[dict, list]:
        """A step whose command writes a JSON, to the file that `option` names or as an argument."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            done = run([*command, *([option] if option else []), str(file)], seconds)
            return done, json.loads(file.read_text()) if file.exists() and file.stat().st_size else []


def why_no_answers() -> str | None:
    """What bench.speed lacks here, None where nothing: it needs SmolLM2 and prompts, and no network is asked."""
    from beagle_sd.evaluation_sets import evaluation_prompts
    from beagle_sd.smollm2 import converted

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


def gpu_tests() -> list[str]:
    """Test files that hold a test for a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if re.search(r"pytest\.mark\.gpu\b", file.read_text())]


def steps(parts: list[str]) -> list[str]:
    """The parts' steps by name, in the order to run them."""
    found = []
    for part in parts:
        kind, _, name = part.partition(":")
        several = {"tests": gpu_tests(), "bench": OPS}.get(kind, [""])
        found += [f"{kind}:{one}".rstrip(":") for one in ([name] if name else several)]
    return found


def main(arguments: list[str]) -> int:
    """Run the parts; the exit status is 0 unless a step failed or found no time, and without a GPU."""
    allowed = [*SECONDS, *(f"tests:{file}" for file in gpu_tests()), *(f"bench:{name}" for name in OPS)]
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(allowed))
    parser.add_argument("--seconds", type=float, default=ALL, help=f"for the whole run (default {ALL})")
    parser.add_argument("--dry-run", action="store_true", help="every step, on the CPU, at a tiny size")
    options = parser.parse_intermixed_args(arguments)
    for part in options.parts:
        if part not in allowed:
            parser.error(f"part {part!r}; allowed: {', '.join(allowed)}")
    out, now, ends = options.out, environment() | {"dry_run": options.dry_run}, time.monotonic() + options.seconds
    before = json.loads(out.read_text()) if out.exists() else {}
    at, then = now["commit"], before.get("environment", {})
    known = at and not at.endswith("-dirty") and then.get("commit") == at and then.get("dry_run") == options.dry_run
    record = {"environment": now, "steps": before.get("steps", {}) if known else {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted, make = steps(options.parts or list(SECONDS)), Steps(options.dry_run, record)
    for step in wanted:
        kind, _, name = step.partition(":")
        if kind != "build" and record["steps"].get(step, {}).get("status") == "passed":
            continue
        if now["gpu"] is None and not options.dry_run:
            done = {"status": "skipped", "why": "torch finds no CUDA device"}
        elif (left := ends - time.monotonic()) < LEAST:
            done = {"status": f"not begun: the {options.seconds:.0f} s were over; run it again to go on"}
        else:
            begin: Callable[[str, float], dict] = getattr(make, kind)
            done = begin(name, min(SECONDS[kind], left))
        record["steps"][step] = done
        print(f"{step}: {done['status']}, {done.get('seconds', 0):.0f} s {done.get('why', '')}", flush=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(out)
    if now["gpu"] is None and not options.dry_run:
        print(f"no GPU: {out} holds no numbers")
        return 0
    return int(any(record["steps"][step]["status"] not in ("passed", "skipped") for step in wanted))


def measured_limits() -> dict[str, float]:
    """The limits, measured in a process that gives the GPU back."""
    code = "import json; from bench.timing import limits; print(json.dumps(limits()))"
    said = command_output(sys.executable, "-c", code)
    return json.loads(said.splitlines()[-1]) if said else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
