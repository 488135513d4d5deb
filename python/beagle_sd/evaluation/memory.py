"""The most memory that a stretch of work holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_FORGET_THE_PEAK = "5"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Do `work`; the most bytes held meanwhile, the weights that were there before among them.

    On a GPU what PyTorch has allocated there; on a CPU the process's resident memory, libraries included, after what
    was free was given back to the system. None where the system does not tell (other than Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    _give_back()
    try:
        (_PROCESS / "clear_refs").write_text(_FORGET_THE_PEAK, encoding="ascii")
        resets = True
    except OSError:
        resets = False
    work()
    return _resident_peak() if resets else None


def _give_back() -> None:
    """Let go of the memory that the C library keeps for later, else one piece of work is counted to the next."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _resident_peak() -> int | None:
    for line in (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
