"""A virtual environment for each engine: python -m bench.engines.environments FOLDER [NAME ...]

Versions are pinned. `convert` exports the models of two engines and alone needs torch; `llamacpp-native`, which
compiles llama.cpp for this processor, is made only when it is named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "llamacpp": ("xllamacpp==2026.10.11549",),
    "openvino": ("openvino-genai==2026.4.1.0",),
    "onnxruntime": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    "convert": (
        "torch==2.13.0",
        "transformers==5.5.4",
        "optimum-intel[openvino]==2.2.0",
        "nncf==3.4.0",
        "openvino==2026.4.1",
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
    ),
    "llamacpp-native": ("llama-cpp-python==0.3.36",),
}
COMPILED = {"llamacpp-native": "llama-cpp-python"}
"""What is built from source, with g++ and cmake: ten minutes and more on a core."""


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of an environment, which may not be there."""
    return folder.resolve() / "environments" / name / "bin" / "python"


def make(folder: Path, name: str) -> None:
    """Make an environment, or bring one that is there to the pinned versions."""
    python = python_of(folder, name)
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = ["--no-binary", COMPILED[name]] if name in COMPILED else []
    subprocess.run([*pip, "install", *source, *PACKAGES[name]], check=True)
    if name == "convert":  # comes with optimum-intel, fits only one build of torch, and serves pictures
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.environments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="they are made in its folder `environments`")
    usual = [name for name in PACKAGES if name not in COMPILED]
    parser.add_argument("names", nargs="*", default=usual, metavar="NAME", help=f"of {', '.join(PACKAGES)}")
    args = parser.parse_args()
    for name in args.names:
        if name not in PACKAGES:
            parser.error(f"{name!r} is no environment; allowed: {', '.join(PACKAGES)}")
        print(f"{name}: {', '.join(PACKAGES[name])}", flush=True)
        make(args.folder, name)


if __name__ == "__main__":
    main()
