"""`python -m bench [NAME ...]`: every op on the CPU or on a GPU beside its peers, ratios in one run.

Names select benchmark files (choose_tokens, tree_attention, ...). A file without `cases` runs under pytest-benchmark,
which `pytest bench/bench_tree_attention.py` does for any of them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import beagle_kernels
from beagle_kernels.__main__ import end_with_reader
from bench.peers import table as peers
from bench.registry import SIZES, lines, measured

ROOT = Path(__file__).resolve().parent.parent
FILES = tuple(sorted(file.stem.removeprefix("bench_") for file in Path(__file__).parent.glob("bench_*.py")))


def main(arguments: list[str]) -> int:
    """Run the cases of the files named, all without a name; 1 where a case was refused its numbers."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FILES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sizes = "; ".join(f"{size}: {what}" for size, what in SIZES.items())
    parser.add_argument("--size", choices=SIZES, help=f"{sizes}; default: small, full on a GPU")
    parser.add_argument("--tuned", type=Path, help="tile sizes that python -m bench.tuning found, for Triton's kernels")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in FILES:
            parser.error(f"{name!r}; allowed: {', '.join(FILES)}")
    on_gpu = options.device == "cuda"
    size = options.size or ("full" if on_gpu else "small")
    if options.tuned:
        from bench.tuning import use

        use(json.loads(options.tuned.read_text()))
    versions = f"beagle_kernels {beagle_kernels.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.cuda.get_device_name() if on_gpu else f'CPU {torch.get_num_threads()} threads'}")
    print("20, 50 and 80 percentiles; x: how many times ours is faster")
    results = []
    for name in options.names or FILES:
        for rows in results_of(name, options.device, size):
            results += rows
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\nnot compared:")
    print(*(f"  {name}: {why}" for name, why in peers(options.device).items() if why), sep="\n")
    return int(any("error" in row for row in results))


def results_of(name: str, device: str, size: str) -> Iterator[list[dict]]:
    """Each case's rows of one file."""
    torch.manual_seed(0)
    module = importlib.import_module(f"bench.bench_{name}")
    if not hasattr(module, "cases"):
        yield pytest_rows(name, size)
        return
    for case in module.cases(device, size):
        yield measured(case)


def pytest_rows(name: str, size: str) -> list[dict]:
    """The rows of a pytest-benchmark file, printed too; one with the error where pytest failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "-q", f"bench/bench_{name}.py", "-k", size]
        done = subprocess.run([*command, f"--benchmark-json={file}", "--benchmark-max-time=0.5"], cwd=ROOT,
                              capture_output=True, text=True)
        found = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {"benchmarks": []}
    rows = [{"group": one["group"], **one["extra_info"]} for one in found["benchmarks"]]
    for group, members in itertools.groupby(sorted(rows, key=lambda row: row["group"]), lambda row: row["group"]):
        print(f"\n{group}", *lines(sorted(members, key=lambda row: row["peer"] != "beagle")), sep="\n", flush=True)
    if done.returncode in (0, 5):  # 5: no shape of this size
        return rows
    print(f"  refused: {done.stdout[-2000:]}")
    return [*rows, {"group": name, "error": f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"}]


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main(sys.argv[1:]))
