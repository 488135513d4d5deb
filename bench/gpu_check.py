"""Build for the GPU at hand, run the tests that need one and every op's benchmark, and write one JSON.

Run it as `bench/gpu_check.sh [OUT [PART ...]]`; parts: build, tests, bench, or a single one as bench:verify_tree. A
step that fails or takes too long is recorded and the next one runs. OUT is written after every step; a run into the
same OUT at the same commit (BEAGLE_COMMIT, or git's) repeats no test or benchmark that is there and passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.__main__ import FILES

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"build": 300, "tests": 240, "bench": 150}
"""A step's time limit."""
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
            found[package] = __import__(package).__version__
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


def run(command: list[str], seconds: int, **variables: str) -> dict:
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
            status = f"stopped after {seconds} s"
        log.seek(0)
        said = {} if status == "passed" else {"output": log.read()[-TAIL:]}
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **said}


def build() -> dict:
    """The extension, in place, for this GPU alone."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run(command, SECONDS["build"], BEAGLE_CUDA="1", BEAGLE_CUDA_ARCHS=native_arch())


def tests(file: str) -> dict:
    """The tests of one file that need a GPU, counted."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", file], SECONDS["tests"])
        if report.exists():
            suites = ElementTree.parse(report).getroot().iter("testsuite")
            counts = next(suites).attrib
            done |= {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
    if done["status"] == "passed" and done.get("tests", 0) == done.get("skipped", 0):
        done["status"] = "failed: nothing ran"
    return done


def bench(name: str, limits: dict) -> dict:
    """One op's rows, each with its share of the machine's limits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench", name, "--device", "cuda", "--json", str(file)]
        done = run(command, SECONDS["bench"])
        rows = json.loads(file.read_text()) if file.exists() and file.stat().st_size else []
    return done | {"limits": limits, "rows": [with_shares(row, limits) for row in rows]}


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
        several = {"build": [""], "tests": gpu_tests(), "bench": FILES}[kind]
        found += [f"{kind}:{one}".rstrip(":") for one in ([name] if name else several)]
    return found


def main(arguments: list[str]) -> int:
    """Run the parts; the exit status is 0 unless a step failed, and without a GPU."""
    allowed = ["build", "tests", "bench", *(f"tests:{file}" for file in gpu_tests()), *(f"bench:{b}" for b in FILES)]
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(allowed))
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in allowed:
            parser.error(f"part {part!r}; allowed: {', '.join(allowed)}")
    out, now = options.out, environment()
    before = json.loads(out.read_text()) if out.exists() else {}
    at = now["commit"]
    known = at and not at.endswith("-dirty") and before.get("environment", {}).get("commit") == at
    record = {"environment": now, "steps": before.get("steps", {}) if known else {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted, limits = steps(options.parts or ["build", "tests", "bench"]), {}
    for step in wanted:
        kind, _, name = step.partition(":")
        if kind != "build" and record["steps"].get(step, {}).get("status") == "passed":
            continue
        if now["gpu"] is None:
            done = {"status": "skipped", "why": "torch finds no CUDA device"}
        elif kind == "bench":
            limits = limits or measured_limits()
            done = bench(name, limits)
        else:
            done = build() if kind == "build" else tests(name)
        record["steps"][step] = done
        print(f"{step}: {done['status']}", flush=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(out)
    if now["gpu"] is None:
        print(f"no GPU: {out} holds no numbers")
        return 0
    return int(any(record["steps"][step]["status"] != "passed" for step in wanted))


def measured_limits() -> dict[str, float]:
    """The limits, measured in a process that gives the GPU back."""
    code = "import json; from bench.timing import limits; print(json.dumps(limits()))"
    said = command_output(sys.executable, "-c", code)
    return json.loads(said.splitlines()[-1]) if said else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
