"""`python -m beagle_kernels`: versions, devices, and which backend serves each op, or why not."""

from __future__ import annotations

import importlib.metadata
import platform
import signal

import torch

from . import __version__, backends
from .extension import missing_cuda


def version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU and the first CUDA device, if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


def end_with_reader() -> None:
    """From here on a reader that has seen enough, as `head`, ends this process and is no error."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main() -> None:
    """Print the report."""
    print(f"beagle_kernels {__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers")))
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(cards) or 'none'}; CPU threads: {torch.get_num_threads()}")
    print(f"CUDA executor: {missing_cuda(torch.device('cuda', 0)) or 'ready for cuda:0'}")
    for device in devices():
        print(f"\nOps on {device.type}, backends in the order that 'auto' tries them:")
        reasons: dict[str, list[str]] = {}
        for op, names in backends.table().items():
            why = {name: backends.why_not(op, name, device) for name in names}
            print(f"  {op:27}{', '.join(name for name in names if why[name] is None)}")
            for name in names:
                if why[name] is not None:
                    reasons.setdefault(f"{name}: {why[name]}", []).append(op)
        for reason, ops in reasons.items():
            print(f"  not {reason}\n    for {', '.join(ops)}")


if __name__ == "__main__":
    end_with_reader()
    main()
