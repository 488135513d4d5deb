"""What this package needs besides beagle_kernels, torch and Triton: the extra `sd`."""

from __future__ import annotations

import importlib.util

MODULES = ("transformers", "accelerate", "numpy", "rich", "safetensors", "tokenizers", "typer")
LATER = ("gguf",)
"""Of the extra too, but imported only where SmolLM2 is converted: a GPU machine may get it after its first import."""


def check() -> None:
    """Raise ImportError, which says what to install, if a module is missing."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'beagle_sd needs {", ".join(missing)}, not installed here: pip install "beagle-kernels[sd]" (the ops '
            "of beagle_kernels need torch alone)"
        )
