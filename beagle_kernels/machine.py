"""What this machine is and what is installed on it, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's model, as Linux names it."""
    named = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver() -> str:
    """The NVIDIA driver of this machine, as Linux names it."""
    return next(iter(_lines("/proc/driver/nvidia/version")), "none").removeprefix("NVRM version: ")


def gpus() -> str:
    """The CUDA devices that torch sees, with their compute capability."""
    if not torch.cuda.is_available():
        return "none"
    devices = range(torch.cuda.device_count())
    named = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in devices]
    return ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in named)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
