"""Our figures, from the files that hold them, beside the paper's (arXiv 2505.24544): docs/paper.md and table 1."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from statistics import fmean

from bench.report import results

FOLDER = results.RESULTS / "paper"
COURSE = {
    "Beagle": (".83 .72 .59 .54 .53", ".90 .81 .73 .68 .67"),
    "EAGLE-2": (".74 .50 .32 .28 .26", ".90 .76 .67 .64 .62"),
}
"""Acceptance at depths 0 to 4 after the first and the tenth epoch, read by eye off figure 3."""
ABLATIONS = {
    "figure4": ("window", "tokens/s", {"1": "93.8", "2": "100.3", "3": "104.0", "4": "101.7", "5": "102.1"}),
    "figure10_steps": ("simulated steps", "tokens/s", {"1": "98.2", "2": "102.2", "3": "104.0", "4": "105.5"}),
    "figure10_stages": (
        "objective",
        "tokens a round",
        {"next token": "3.70", "block": "4.02", "block + simulation": "4.31"},
    ),
    "start": ("start", "tokens a round", {}),
    "append": ("draft states as keys", "tokens/s", {"append": "109.0", "no append": "107.4"}),
    "order": ("objective", "tokens a round", {"next token": "3.70", "block + simulation": "4.31"}),
    "losses": ("loss", None, {}),
    "optimizer": ("optimizer", None, {}),
    "precision": ("products", None, {}),
}
"""Figure -> what differs, the paper's unit and its values on MT-Bench, of a 7B target's draft after 20 epochs."""


def settings(name: str) -> str:
    """What all runs of a figure share, but for what some have of their own."""
    path = FOLDER / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    if found is None:
        return "not measured"
    threads = ""
    if count := found.get("threads"):
        threads = f", {count} CPU thread{'s' if count > 1 else ''} a run"
    own = {name for options in found.get("options", {}).values() for name in options}
    rate = "the learning rate" if "lr" in own else f"learning rate {found['lr']:g}"
    products = "" if "autocast" in own else f", products in {'bf16' if found['autocast'] else 'fp32'}"
    shapes = found["shapes"]
    return (
        f"Target {found['target']}; {found['tokens']:,} training tokens in {found['sequences']:,} sequences of "
        f"`{found['data']}`, {found['held_out_sequences']} held out; {found['epochs']:g} epochs a phase, "
        f"{found['tokens_per_step']:,} tokens a step, {rate} falling to a tenth by a cosine, {found['warmup_steps']} "
        f"steps of warm-up in each phase, regression weight {found['regression']:g}, draft vocabulary "
        f"{found['draft_vocab']:,}{products}{threads}. A Beagle draft has a key head for every query head and the "
        f"start of `beagle_sd.training.start`, where a table does not say otherwise. Chain of {shapes['chain'][0]}; "
        f"tree of {shapes['tree'][2]} nodes, depth {shapes['tree'][0]}, branch {shapes['tree'][1]}."
    )


def course() -> str:
    """Acceptance by depth over training, beside the paper's first and last epoch."""
    lines = _course("figure3", "epochs", [row["epoch"] for row in _rows("figure3")])
    for head, (first, last) in COURSE.items():
        for epoch, shares in ((1, first), (10, last)):
            lines.append(f"| {head}, the paper's, 7B | | {epoch} | | {shares} |")
    return "\n".join(lines)


def seconds() -> str:
    """Acceptance by depth over seconds of training."""
    lines = _course("seconds", "seconds", [f"{float(row['seconds']):.0f}" for row in _rows("seconds")])
    return "\n".join(lines) if len(lines) > 2 else "not measured"


def _course(name: str, over: str, places: list[str]) -> list[str]:
    """The lines of a figure's evaluations, `places` being where each stands."""
    lines = [f"| head | seed | {over} | tokens seen | acceptance at depths 0 to 4 |", "|---|---|---|---|---|"]
    for row, place in zip(_rows(name), places, strict=True):
        lines.append(f"| {row['run']} | {row['seed']} | {place} | {int(row['tokens_seen']):,} | {_by_depth(row)} |")
    return lines


def ablation(name: str) -> str:
    """Tokens a round of each run, a step's memory where that was measured, and the paper's figure. A line is the mean
    over a run's seeds."""
    what, unit, published = ABLATIONS[name]
    measured = _rows(name)
    heads = [what, "seed", "tokens seen", "chain", "tree", "accepted by depth, chain"]
    costs = bool(measured) and "peak_bytes" in measured[0]
    heads += ["peak MB"] if costs else []
    heads += [f"the paper's {unit}"] if unit else []
    lines = []
    for label in dict.fromkeys(row["run"] for row in measured):
        seeds = [row for row in measured if row["run"] == label]
        mean = {key: fmean(float(row[key]) for row in seeds) for key in seeds[0] if key not in ("run", "seed")}
        cells = [label, ", ".join(row["seed"] for row in seeds), f"{mean['tokens_seen']:,.0f}"]
        cells += [_with_spread(shape, mean, seeds) for shape in ("chain", "tree")]
        cells.append(_by_depth(mean))
        cells += [f"{mean['peak_bytes'] / 1e6:.0f}"] if costs else []
        cells += [published.get(label, "")] if unit else []
        lines.append(cells)
    if not measured:
        absent = ["", "", "not measured", "", ""]
        lines = [[label, *absent, value] for label, value in published.items()] or [
            ["", *absent, *([""] if unit else [])]
        ]
    rows = [f"| {' | '.join(cells)} |" for cells in [heads, *lines]]
    return "\n".join([rows[0], "|---" * len(heads) + "|", *rows[1:]])


def _with_spread(shape: str, mean: dict[str, float], seeds: list[dict]) -> str:
    """A single seed's standard error over answers, or the least and the most of several seeds."""
    if len(seeds) == 1:
        return f"{mean[shape]:.3f} ± {mean[f'{shape}_error']:.3f}"
    found = [float(row[shape]) for row in seeds]
    return f"{mean[shape]:.3f} ({min(found):.3f} to {max(found):.3f})"


def _rows(name: str) -> list[dict]:
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _by_depth(row: dict) -> str:
    shares = (row.get(f"depth_{depth}") for depth in range(5))
    return " ".join(f"{float(share):.2f}".lstrip("0") for share in shares if share is not None)


TABLE_1 = {
    # target -> method -> tokens a second, speedup, tokens a round, peak GB (arXiv 2505.24544, table 1, MT-Bench)
    "Vicuna-7B": {
        "plain": (35.2, 1.0, 1.0, 13.7),
        "Medusa": (71.2, 2.0, 2.1, 15.0),
        "EAGLE-2": (103.4, 2.9, 4.0, 14.5),
        "Beagle": (104.6, 3.0, 4.1, 13.5),
    },
    "LLaMA-2-7B": {"EAGLE-2": (104.9, 3.0, 4.0, 15.5), "Beagle": (106.2, 3.0, 4.1, 13.5)},
    "LLaMA-3-8B": {"EAGLE-2": (80.2, 2.5, 3.6, 17.8), "Beagle": (79.2, 2.5, 3.5, 15.7)},
}


def table_1() -> str:
    """The paper's table 1 on MT-Bench, beside whole answers on the CPU and whole rounds on a GPU."""
    lines = [
        "| where | target | method | tokens/s | speedup | tokens a round | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, methods in TABLE_1.items():
        lines += [
            f"| the paper, A6000 Ada | {target} | {method} | " + " | ".join(f"{x:.1f}" for x in numbers) + " |"
            for method, numbers in methods.items()
        ]
    for measured, row in results.speed_rows():
        if row["prompts"] != "mt-bench" or measured["temperature"] != 0:
            continue
        tokens = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.1f}"
        cells = (
            f"{measured['threads']} CPU threads, {row['prompts']}",
            f"{measured['target']} {measured['dtype']}",
            row["contender"],
            f"{1e3 / row['ms_per_token']:.1f}",
            f"{row['median']:.2f}",
            tokens,
            _peak(row),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_rounds()])


def _rounds() -> list[str]:
    """Rows of the paper's table for whole rounds on a GPU: speedup over target.generate."""
    record, lines = results.gpu_record(), []
    for group, rows in results.grouped(record["steps"].get("round", {}).get("rows", [])).items():
        if any("error" in row for row in rows):
            lines.append(f"| {record['environment']['gpu']} | {group} | refused |  |  |  |  |")
            continue
        base = next((row["p50"] for row in rows if row["peer"] == "target.generate"), None)
        for row in rows:
            name = f"{row['peer']}{', replayed acceptance' if row['acceptance'] == 'replayed' else ''}"
            cells = (
                record["environment"]["gpu"],
                f"{row['at']['model']}, batch {row['at']['batch']}",
                name,
                f"{row['token/s']:.1f}",
                f"{base / row['p50']:.2f}" if base else "not measured",
                f"{row['tokens_per_round']:.1f}",
                _peak(row),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines or ["| a GPU | 8B-shaped random bfloat16 | Beagle, replayed acceptance | not measured |  |  |  |"]


def _peak(row: dict) -> str:
    """Of memory, in GB."""
    return "not measured" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f}"


TABLES: dict[str, Callable[[], str]] = {"paper": table_1, "paper_figure3": course, "paper_seconds": seconds}
TABLES |= {f"paper_{name}": partial(ablation, name) for name in ABLATIONS}
TABLES |= {f"paper_settings_{name}": partial(settings, name) for name in ("figure3", "seconds", *ABLATIONS)}
