"""`python -m beagle_kernels`: versions, devices, each op's backends and why one is not there, for a bug report."""

from __future__ import annotations

import platform
import signal

import torch

from . import __version__, backends, extension
from .machine import cores, driver, gpus, processor, version


def devices() -> list[torch.device]:
    """The CPU and the first CUDA device, if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


def end_with_reader() -> None:
    """From here on a reader that has seen enough, as `head`, ends this process and is no error."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main() -> None:
    """Print the report."""
    installed = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    print(f"beagle_kernels {__version__}: {extension.described()}")
    print(f"{installed}; torch's CUDA: {torch.version.cuda or torch.version.hip or 'none'}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(f"CPU: {processor()}, {cores()} cores, {torch.get_num_threads()} threads")
    print(f"GPU: {gpus()}; driver: {driver()}")
    print(f"CUDA executor: {extension.missing_cuda(torch.device('cuda', 0)) or 'ready for cuda:0'}")
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
