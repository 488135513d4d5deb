"""`python -m bench [NAME ...]`: the verification ops on the CPU or on a GPU, ratios in one run.

Names select benchmark files (choose_tokens, verify_tree, ...). The attention ops run under pytest-benchmark:
`pytest bench/bench_tree_attention.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

import beagle_kernels

FILES = ("choose_tokens", "verify_tree", "verify_chain", "build_tree", "compact_cache")


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
        for case in importlib.import_module(f"bench.bench_{name}").cases(options.device):
            print(f"\n{case.name}, {case.data}")
            results += measured(case)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    return int(any("error" in row for row in results))


def measured(case) -> list[dict]:
    """A case's rows, or the error that it has instead."""
    try:
        case.run()
    except Exception as error:  # one case's failure leaves the others their numbers
        print(f"  refused: {type(error).__name__}: {error}")
        return [{"group": case.name, "error": f"{type(error).__name__}: {error}"}]
    print(*case.lines(), sep="\n", flush=True)
    return case.rows()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
