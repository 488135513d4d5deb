"""The paper's ablations on a small target: python -m bench.recipes.paper FIGURE ... --states DIR --work DIR

Each figure does the training runs it lacks in --work (safe to kill and run again; figures share runs) and writes a CSV
and a plot into --out. The states come from `beagle-sd prepare` over answers that the target wrote.
`python -m bench.report` then puts the tables into docs/paper.md, beside the paper's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from beagle_sd.data.shards import read_manifest
from beagle_sd.files import write_json
from bench.environment import versions
from bench.recipes.paper.figures import FIGURES, make
from bench.recipes.paper.runs import RUNS, SHAPES, Runner, Settings
from bench.report.results import RESULTS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipes.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "figures", nargs="+", choices=(*FIGURES, "all"), metavar="FIGURE", help=", ".join((*FIGURES, "all"))
    )
    parser.add_argument("--states", type=Path, required=True, help="folder of `beagle-sd prepare`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, about 100 MB each")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for field in fields(Settings):
        kind = {"action": "store_true"} if field.default is False else {"type": type(field.default)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind)
    options = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    runner = Runner(options.states, options.work, options.target, settings)
    manifest = read_manifest(options.states)
    record = {
        "target": options.target,
        "data": manifest.get("source"),
        **asdict(settings),
        "shapes": SHAPES,
        "sequences": len(runner.dataset.train),
        "tokens": runner.tokens,
        "held_out_sequences": len(runner.dataset.evaluation),
        "threads": torch.get_num_threads(),
        "versions": versions("beagle_kernels", "torch", "transformers"),
    }
    kept = options.out / "settings.json"
    for name in FIGURES if "all" in options.figures else options.figures:
        make(name, runner, options.seeds, options.out)
        changed = {label: dict(RUNS[run].options) for label, run in FIGURES[name].runs.items()}
        others = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        write_json(kept, others | {name: record | {"options": changed}})
        print(f"{name}: {options.out / name}.csv and .svg", flush=True)


if __name__ == "__main__":
    main()
