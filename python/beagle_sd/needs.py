"""What this package needs besides beagle_kernels, torch and Triton: the extra `sd`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

MODULES = ("transformers", "accelerate", "numpy", "rich", "safetensors", "tokenizers", "typer")
LATER = ("gguf",)
"""Of the extra too, but imported only where SmolLM2 is converted: a GPU machine may get it after its first import."""


LOWEST = "5.17"
"""Of transformers, as pyproject.toml has it."""


def check() -> None:
    """Raise ImportError, which says what to install, if a module is missing or transformers is too old."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'beagle_sd needs {", ".join(missing)}, not installed here: pip install "beagle-kernels[sd]" (the ops '
            "of beagle_kernels need torch alone)"
        )
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, whose version nobody wrote down
        return
    if first_two(version) < first_two(LOWEST):
        raise ImportError(
            f'transformers {version} is installed; allowed: {LOWEST} or later (pip install "transformers>={LOWEST}")'
        )


def first_two(version: str) -> list[int]:
    """The version's first two numbers."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
