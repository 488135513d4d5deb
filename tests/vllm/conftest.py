"""`make test-vllm` alone runs this folder: vLLM has an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

_found = importlib.util.find_spec("vllm")  # of this very folder, where the tests are on the path, without an origin
HERE = _found is not None and _found.origin is not None
collect_ignore_glob = [] if HERE else ["*.py"]

sys.path.append(str(Path(__file__).parent))

# before vllm is imported: a small cache, all cores for every process, nothing told to anyone, functions sent to workers
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
}
if HERE:
    os.environ |= _ENVIRONMENT


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_counts() -> None:
    """Also where these tests were begun in the background, with Ctrl-C ignored, which processes inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def texts() -> list[list[int]]:
    from vllm_engines import prompts

    return prompts()
