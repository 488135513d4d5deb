"""`python -m bench [NAME ...]`: every op on the CPU or on a GPU beside its peers, ratios in one run.

Names select benchmark files (choose_tokens, tree_attention, ...); `pytest bench/ops/bench_tree_attention.py` runs one
under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import beagle_kernels
from beagle_kernels.__main__ import end_with_reader
from bench.peers import table as peers
from bench.registry import SIZES, Case, measured

MODULES = {
    file.stem.removeprefix("bench_"): f"bench.{folder}.{file.stem}"
    for folder in ("ops", "loops")
    for file in sorted((Path(__file__).parent / folder).glob("bench_*.py"))
}


def main(arguments: list[str]) -> int:
    """Run the cases of the files named, all without a name; 1 where a case was refused its numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sizes = "; ".join(f"{size}: {what}" for size, what in SIZES.items())
    parser.add_argument("--size", choices=SIZES, help=f"{sizes}; default: small, full on a GPU")
    parser.add_argument("--tuned", type=Path, help="tile sizes that python -m bench.tuning found, for Triton's kernels")
    parser.add_argument("--json", type=Path, help="also write the results there, each as it is there")
    parser.add_argument("--go-on", action="store_true", help="keep what is there, and measure what is not")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in MODULES:
            parser.error(f"{name!r}; allowed: {', '.join(MODULES)}")
    on_gpu = options.device == "cuda"
    size = options.size or ("full" if on_gpu else "small")
    if options.tuned:
        from bench.tuning import use

        use(json.loads(options.tuned.read_text()))
    versions = f"beagle_kernels {beagle_kernels.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.cuda.get_device_name() if on_gpu else f'CPU {torch.get_num_threads()} threads'}")
    print("20, 50 and 80 percentiles; x: how many times ours is faster")
    kept = options.go_on and options.json and options.json.exists()
    results = json.loads(options.json.read_text()) if kept else []
    for name in options.names or MODULES:
        for row in rows_of(name, options.device, size, results):
            results.append(row | ({"tuned": True} if options.tuned else {}))
            if options.json:
                written(options.json, results)
    print("\nnot compared:")
    print(*(f"  {name}: {why}" for name, why in peers(options.device).items() if why), sep="\n")
    return int(any("error" in row for row in results))


def rows_of(name: str, device: str, size: str, results: list[dict]) -> Iterator[dict]:
    """The rows of one file as they are there, but for cases that `results` has whole; the rows of one that it has in
    part are taken from it."""
    torch.manual_seed(0)
    try:
        for case in importlib.import_module(MODULES[name]).cases(device, size):
            if whole(case, results):
                continue
            results[:] = [row for row in results if row["group"] not in (case.name, name)]
            yield from measured(case)
    except Exception as error:  # a case that cannot be made leaves the other files their numbers
        print(f"\n{name}\n  refused: {type(error).__name__}: {error}", flush=True)
        yield {"group": name, "peer": "beagle", "error": f"{type(error).__name__}: {error}"}


def whole(case: Case, results: list[dict]) -> bool:
    """Whether each of the case's peers has a row there, and none an error."""
    rows = [row for row in results if row["group"] == case.name]
    return {row["peer"] for row in rows} >= set(case.peers) and not any("error" in row for row in rows)


def written(file: Path, value: object) -> None:
    """The value as JSON in the file, whole at any moment."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, file)


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main(sys.argv[1:]))
