"""What a number was taken on: versions, the machine, the commit and the sources that ran."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from beagle_kernels.machine import processor
from bench.processes import ROOT

SOURCES = (
    "setup.py",
    "pyproject.toml",
    "csrc/**/*",
    "beagle_kernels/**/*.py",
    "python/**/*.py",
    "bench/**/*.py",
    "tests/**/*.py",
)


def versions(*packages: str) -> dict[str, str | None]:
    """The version of each package, None where it cannot be imported."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            module = importlib.import_module(package)
            found[package] = getattr(module, "__version__", None) or metadata.version(package)
        except ImportError:
            found[package] = None
    return found


def machine() -> dict:
    """The commit and sources that ran, and on what processor with how many threads: for the record of a run on a
    CPU."""
    threads = torch.get_num_threads()
    return {"commit": commit(), "sources": sources(), "threads": threads, "processor": processor()}


def device_name(device: str) -> str:
    """The GPU's name, or how many threads of the CPU torch uses."""
    return torch.cuda.get_device_name(device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def native_arch() -> str:
    """The GPU's architecture as nvcc writes it."""
    return "".join(map(str, torch.cuda.get_device_capability()))


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


def sources(root: Path = ROOT) -> str:
    """A hash of all that a benchmark runs: it says what was measured where there is no git, and where files were
    edited."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()}):
        content = file.read_bytes()
        found.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def environment() -> dict:
    """All of it, for the record of a run on a GPU."""
    found: dict = {"commit": commit(), "sources": sources(), "gpu": None, "python": sys.version.split()[0]}
    found |= versions("torch", "triton", "transformers")
    found["nvcc"] = command_output(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc", "-V")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "arch": native_arch(), "memory": gpu.total_memory, "l2": gpu.L2_cache_size}
        found["driver"] = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found
