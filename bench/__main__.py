"""`python -m bench [NAME ...]`: every op on the CPU or on a GPU beside its peers, ratios in one run.

Names select benchmark files (choose_tokens, tree_attention, ...); `pytest bench/ops/bench_tree_attention.py` runs one
under pytest-benchmark. `--base REF` instead compares our own rows with those of another commit. `--without-peers`
measures ours and the bounds alone, every file's in a fraction of the time; the same `--json` file with `--go-on` and
without that option then adds the peers, and measures ours again beside them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from beagle_kernels.__main__ import end_with_reader
from bench import base
from bench.environment import device_name, versions
from bench.peers import table as peers
from bench.registry import SIZES, Case, is_ours, measured

MODULES = {
    file.stem.removeprefix("bench_"): f"bench.{folder}.{file.stem}"
    for folder in ("ops", "loops", "peers")
    for file in sorted((Path(__file__).parent / folder).glob("bench_*.py"))
}


def main(arguments: list[str]) -> int:
    """Run the cases of the files named, all without a name; 1 where a case was refused its numbers."""
    options = parsed(arguments)
    if options.base:
        try:
            return base.compare(options.base, options.names, options.device, options.size, options.tuned, options.json)
        except base.BaseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    tiles = {}
    if options.tuned:
        from bench.tuning import label, use

        entries = json.loads(options.tuned.read_text())
        use(entries)
        tiles = {"tiles": name} if (name := label(entries)) else {}
    used = ", ".join(f"{name} {version}" for name, version in versions("beagle_kernels", "torch").items())
    print(f"{used}, {device_name(options.device)}")
    print("20, 50 and 80 percentiles; x: how many times ours is faster")
    kept = options.go_on and options.json and options.json.exists()
    results = json.loads(options.json.read_text()) if kept else []
    for name in options.names:
        kept_peers = "bounds" if options.without_peers else "all"
        for row in rows_of(name, options.device, options.size, results, kept_peers, tiles.get("tiles")):
            add(results, row | tiles)
            if options.json:
                # not above: transformers imports Triton, which may have to be asked for its interpreter first
                from beagle_sd.files import write_json

                write_json(options.json, results)
    if not options.without_peers:
        print("\nnot compared:")
        print(*(f"  {name}: {why}" for name, why in peers(options.device).items() if why), sep="\n")
    return int(any("error" in row for row in results))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; what is not allowed ends the process as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(MODULES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sizes = "; ".join(f"{size}: {what}" for size, what in SIZES.items())
    parser.add_argument("--size", choices=SIZES, help=f"{sizes}; default: small, full on a GPU")
    parser.add_argument("--tuned", type=Path, help="tile sizes that python -m bench.tuning found, for Triton's kernels")
    parser.add_argument("--json", type=Path, help="also write the results there, each as soon as it is known")
    parser.add_argument("--go-on", action="store_true", help="keep the results in the --json file, measure the others")
    parser.add_argument("--without-peers", action="store_true", help="ours and the bounds alone")
    parser.add_argument("--base", metavar="REF", help="compare with this commit, built in a temporary worktree of git")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in MODULES:
            parser.error(f"{name!r}; allowed: {', '.join(MODULES)}")
    for other in ("go_on", "without_peers"):
        if options.base and getattr(options, other):
            parser.error(f"--base and --{other.replace('_', '-')} were given; allowed: one of them")
    options.names = options.names or list(MODULES)
    options.size = options.size or ("full" if options.device == "cuda" else "small")
    return options


def rows_of(
    name: str, device: str, size: str, results: list[dict], peers: str = "all", tiles: str | None = None
) -> Iterator[dict]:
    """The rows of one file, each as soon as it is measured, except for cases that are complete in `results` with these
    tiles; errors of a case that is measured again are removed from it. peers: "all" are timed, or of those that are not
    ours only the "bounds", or "none". The caller adds each row to `results` before it asks for the next."""
    torch.manual_seed(0)
    try:
        module = importlib.import_module(MODULES[name])
        if getattr(module, "OF_A_PEER", False):
            made = module.cases(device, size, results) if peers == "all" else ()
        else:
            made = module.cases(device, size)
        for case in made:
            if peers != "all":
                bounds = case.bounds if peers == "bounds" else ()
                kept = {peer: run for peer, run in case.peers.items() if is_ours(peer) or peer in bounds}
                case = replace(case, peers=kept)
            if is_complete(case, [row for row in results if row.get("tiles") == tiles]):
                continue
            results[:] = [
                row for row in results if row["group"] != name and ("error" not in row or row["group"] != case.name)
            ]
            yield from measured(case)
    except Exception as error:  # a case that cannot be made leaves the other files their numbers
        print(f"\n{name}\n  refused: {type(error).__name__}: {error}", flush=True)
        yield {"group": name, "peer": "beagle", "error": f"{type(error).__name__}: {error}"}


def add(results: list[dict], row: dict) -> None:
    """In place of the row that the peer had; in place of all that the case had where this one is an error, or they are
    of other tiles."""

    def stays(old: dict) -> bool:
        same = old["peer"] != row["peer"] and old.get("tiles") == row.get("tiles") and "error" not in row
        return old["group"] != row["group"] or same

    results[:] = [*filter(stays, results), row]


def is_complete(case: Case, results: list[dict]) -> bool:
    """Whether each of the case's peers has a row there, and none an error."""
    rows = [row for row in results if row["group"] == case.name]
    return {row["peer"] for row in rows} >= set(case.peers) and not any("error" in row for row in rows)


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main(sys.argv[1:]))
