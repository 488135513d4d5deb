"""`python -m bench [NAME ...]`: every op on the CPU or on a GPU beside its peers, ratios in one run.

Names select benchmark files (choose_tokens, tree_attention, ...). Attention and loss run under pytest-benchmark, which
`pytest bench/bench_tree_attention.py` does too.
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
from bench.registry import lines

ROOT = Path(__file__).resolve().parent.parent

BY_PYTEST = ("block_attention", "extend_attention", "tree_attention", "distill_loss")
"""Files whose cases only pytest-benchmark can run; the others list theirs in `cases`."""
FILES = ("choose_tokens", "verify_tree", "verify_chain", "build_tree", "compact_cache", "training_step", *BY_PYTEST)


def main(arguments: list[str]) -> int:
    """Run the cases of the files named, all without a name; 1 where a case was refused its numbers."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FILES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in FILES:
            parser.error(f"{name!r}; allowed: {', '.join(FILES)}")
    versions = f"beagle_kernels {beagle_kernels.__version__}, torch {torch.__version__}"
    on_gpu = options.device == "cuda"
    print(f"{versions}, {torch.cuda.get_device_name() if on_gpu else f'CPU {torch.get_num_threads()} threads'}")
    print("20, 50 and 80 percentiles; x: how many times ours is faster")
    results = []
    for name in options.names or FILES:
        if name in BY_PYTEST:
            results += pytest_rows(name, options.device)
        else:
            for case in importlib.import_module(f"bench.bench_{name}").cases(options.device):
                print(f"\n{case.name}, {case.data}")
                results += measured(case)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("error" in row for row in results))


def measured(case) -> list[dict]:
    """A case's rows, or the error that it has instead."""
    try:
        case.run()
    except Exception as error:  # one case's failure leaves the others their numbers
        print(f"  refused: {type(error).__name__}: {error}")
        return [{"group": case.name, "error": f"{type(error).__name__}: {error}"}]
    print(*lines(case.rows()), sep="\n", flush=True)
    return case.rows()


def pytest_rows(name: str, device: str) -> list[dict]:
    """The rows of a pytest-benchmark file, printed too; one with the error where pytest failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        size = "full" if device == "cuda" else "small"
        command = [sys.executable, "-m", "pytest", "-q", f"bench/bench_{name}.py", "-k", size]
        done = subprocess.run([*command, f"--benchmark-json={file}", "--benchmark-max-time=0.5"], cwd=ROOT,
                              capture_output=True, text=True)
        found = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {"benchmarks": []}
    rows = [{"group": one["group"], **one["extra_info"]} for one in found["benchmarks"]]
    print(*table(rows), sep="\n", flush=True)
    if done.returncode == 0:
        return rows
    print(f"  refused: {done.stdout[-2000:]}")
    return [*rows, {"group": name, "error": f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"}]


def table(rows: list[dict]) -> Iterator[str]:
    """One line a row under its group, ours first; rows of one group need not stand together."""
    for group, members in itertools.groupby(sorted(rows, key=lambda row: row["group"]), lambda row: row["group"]):
        yield f"\n{group}"
        yield from lines(sorted(members, key=lambda row: row["peer"] != "beagle"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
