"""Writes what was measured into the README, docs/performance.md and the bundled draft's card, from the files that hold
the numbers: python -m bench.report

A table, or a figure within a sentence, stands between `<!-- NAME -->` and `<!-- end -->`; `--check` changes nothing and
fails where one is stale.
`--plots` draws the figures too; `--configs FILE` prints instead the tiles that a GPU's run found, as the lines of
beagle_kernels/triton/configs.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from bench.report.paper import TABLES as REPRODUCTION

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
BUNDLED = ROOT / "python" / "beagle_sd" / "bundled" / "smollm2-135m"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "paper.md", BUNDLED / "README.md")


def acceptance() -> str:
    """Tokens a round of the bundled draft, greedy beside T = 1."""
    measured = json.loads((BUNDLED / "acceptance.json").read_text(encoding="utf-8"))
    found = {(row["num_nodes"], row["depth"], row["branch"], row["temperature"]): row for row in measured["shapes"]}
    lines = ["| tree | tokens a round, greedy | at T = 1 | accepted by depth, greedy |", "|---|---|---|---|"]
    for nodes, depth, branch in sorted({key[:3] for key in found}):
        greedy, sampled = found.get((nodes, depth, branch, 0.0)), found.get((nodes, depth, branch, 1.0))
        name = f"chain of {depth}" if branch == 1 else f"{nodes} nodes (depth {depth}, branch {branch})"
        by_depth = " ".join(f"{share:.2f}" for share in greedy["acceptance_by_depth"]) if greedy else ""
        lines.append(f"| {name} | {_tokens(greedy)} | {_tokens(sampled)} | {by_depth} |")
    return "\n".join(lines)


def _tokens(row: dict | None) -> str:
    return "not measured" if row is None else f"{row['tokens_per_round']:.2f}"


def speed() -> str:
    """Seconds of whole answers on the CPU, every contender over target.generate in the same dtype; beside it the speed
    after the prefill over plain decoding in the same loop, and the same by tokens a round and calibrated costs."""
    lines = [
        "| prompts | dtype, T | contender | ms a token | tokens a round | x `target.generate`, median (20%, 80%) "
        "| 95% lower bound | x plain decoding (predicted) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measured, row in speed_rows():
        tokens, bound, decode = (
            ("" if row[name] is None else f"{row[name]:.2f}") for name in ("tokens_per_round", "bound", "decode")
        )
        decode += "" if row["predicted"] is None else f" ({row['predicted']:.2f})"
        cells = (
            row["prompts"],
            f"{measured['dtype']}, {measured['temperature']:g}",
            row["contender"],
            f"{row['ms_per_token']:.1f}",
            tokens,
            f"{row['median']:.2f} ({row['low']:.2f}, {row['high']:.2f})",
            bound,
            decode,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def result() -> str:
    """The README's few rows: greedy answers to MT-Bench, without the fixed tree."""
    lines = ["| | ms a token | tokens a round | x `target.generate`, median (20%, 80%) |", "|---|---|---|---|"]
    for measured, row in speed_rows():
        if (row["prompts"], measured["temperature"]) != ("mt-bench", 0) or "tree of" in row["contender"]:
            continue
        tokens = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
        ratio = f"{row['median']:.2f} ({row['low']:.2f}, {row['high']:.2f})"
        lines.append(f"| {row['contender']} | {row['ms_per_token']:.1f} | {tokens} | {ratio} |")
    return "\n".join(lines)


def speed_rows() -> Iterator[tuple[dict, dict]]:
    """(run, row) of every contender in the CPU's files."""
    for path in sorted(RESULTS.glob("cpu-speed*.json"), key=lambda path: path.stem):
        measured = json.loads(path.read_text(encoding="utf-8"))
        for row in measured["rows"]:
            yield measured, row


def lossless() -> str:
    """Tokens compared with the truth, ties of two logits within 1e-3, and faults."""
    lines = ["| sampling | tree | batch | tokens compared | ties | faults |", "|---|---|---|---|---|---|"]
    for row in json.loads((RESULTS / "lossless.json").read_text(encoding="utf-8")):
        cells = (row["sampling"], row["shape"], row["batch"], f"{row['tokens']:,}", row["ties"], row["faults"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ops() -> str:
    """Every op on the CPU beside its fastest peer: medians, and how many times ours is faster."""
    lines = ["| op and shape | ours, µs | fastest peer | its µs | ratio | bound, µs |", "|---|---|---|---|---|---|"]
    for group, rows in grouped(json.loads((RESULTS / "cpu-ops.json").read_text(encoding="utf-8"))).items():
        if any("error" in row for row in rows):
            lines.append(f"| {group} | refused |  |  |  |  |")
            continue
        ours, peer, time = against_fastest(rows)
        bound = ", ".join(f"{row['peer']} {row['p50'] * 1e6:,.0f}" for row in rows if row.get("bound"))
        lines.append(f"| {group} | {ours * 1e6:,.0f} | {peer} | {time * 1e6:,.0f} | {time / ours:.2f}x | {bound} |")
    return "\n".join(lines)


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by group, without those that have neither a number nor an error."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if "p50" in row or "error" in row:
            groups.setdefault(row["group"], []).append(row)
    return groups


def against_fastest(rows: list[dict]) -> tuple[float, str, float]:
    """(seconds of ours, the fastest peer, its seconds) of one group, of its bounds where it has no other peer;
    ValueError where it has neither."""
    ours = next(row["p50"] for row in rows if row["peer"] == "beagle")
    others = [row for row in rows if row["peer"] != "beagle"]
    if not others:
        raise ValueError(f"{rows[0]['group']} has no peer with a number; allowed: one or more")
    peers = {row["peer"]: row["p50"] for row in [row for row in others if not row.get("bound")] or others}
    peer, time = min(peers.items(), key=lambda item: item[1])
    return ours, peer, time


def gpu_rows() -> list[dict]:
    """All rows of the GPU's run; none without one."""
    path = RESULTS / "gpu.json"
    if not path.exists():
        return []
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    return [row for name, step in steps.items() if name.startswith("bench") for row in step.get("rows", [])]


def gpu() -> str:
    """Every op on the GPU beside its fastest peer, with its share of the limits measured in the same run."""
    head = [
        "| op and shape | ours, µs | share of copy | share of matmul | fastest peer | ratio | bound, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    lines = []
    for group, rows in grouped(gpu_rows()).items():
        if any("error" in row for row in rows):
            lines.append(f"| {group} | refused |  |  |  |  |  |")
            continue
        own = next(row for row in rows if row["peer"] == "beagle")
        shares = [f"{own[name]:.0%}" if name in own else "" for name in ("share of copy", "share of matmul")]
        bound = ", ".join(f"{row['peer']} {row['p50'] * 1e6:,.0f}" for row in rows if row.get("bound"))
        beside = "none was measured", ""  # a run that was stopped after ours
        if len(rows) > 1:
            ours, peer, time = against_fastest(rows)
            clock = next(row for row in rows if row["peer"] == peer).get("clock")
            clocks = f" (by {clock}, ours by {own['clock']})" if clock != own.get("clock") else ""
            beside = peer + clocks, f"{time / ours:.2f}x"
        cells = (group, f"{own['p50'] * 1e6:,.1f}", *shares, *beside, bound)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*head, *(lines or ["| every op | not measured |  |  |  |  |  |"])])


def compiled() -> str:
    """Every Triton kernel as two versions of the compiler make it: registers and spilt bytes a thread, and the most
    seconds that compiling took."""
    rows = [row for path in sorted(RESULTS.glob("compiled-*.json")) for row in json.loads(path.read_text("utf-8"))]
    versions = sorted({row["triton"] for row in rows})
    columns = [(arch, version) for arch in sorted({row["arch"] for row in rows}) for version in versions]
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["launch"], row["kernel"], row["dtype"], row["head_size"]
        found.setdefault(key, {})[row["arch"], row["triton"]] = row
    head = ["launch", "kernel", "dtype", "D", *(f"sm_{arch}, {version}" for arch, version in columns), "at most, s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, cells in found.items():
        used = [_registers(cells[column]) if column in cells else "as above" for column in columns]
        lines.append(f"| {' | '.join(map(str, [*key, *used]))} | {max(row['seconds'] for row in cells.values()):.1f} |")
    return "\n".join(lines)


def _registers(row: dict) -> str:
    return f"{row['registers']} + {row['spills']} B" if row["spills"] else str(row["registers"])


PAPER = {
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


def paper() -> str:
    """The paper's table 1 on MT-Bench, beside whole answers on the CPU and whole rounds on a GPU."""
    lines = [
        "| where | target | method | tokens/s | speedup | tokens a round | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, methods in PAPER.items():
        lines += [
            f"| the paper, A6000 Ada | {target} | {method} | " + " | ".join(f"{x:.1f}" for x in numbers) + " |"
            for method, numbers in methods.items()
        ]
    for measured, row in speed_rows():
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
    path, lines = RESULTS / "gpu.json", []
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": {}}
    for group, rows in grouped(record["steps"].get("round", {}).get("rows", [])).items():
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


def speedup() -> str:
    """Of the adaptive tree over target.generate, greedy: the medians of the sets of prompts, lowest and highest."""
    found = sorted(
        row["median"]
        for measured, row in speed_rows()
        if row["contender"] == "beagle, adaptive tree" and measured["temperature"] == 0
    )
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def simulation() -> str:
    return f"{_step_over_stage_1('beagle'):.2f}"


def literal_simulation() -> str:
    return f"{_step_over_stage_1('literal passes'):.1f}"


def _step_over_stage_1(peer: str) -> float:
    """Time of a training step of stage 2, ours or another's, over one of stage 1."""
    groups = grouped(json.loads((RESULTS / "cpu-ops.json").read_text(encoding="utf-8")))
    times = {row["peer"]: row["p50"] for row in groups["training step, k = 5, 2048 rows"]}
    return times[peer] / times["stage 1"]


def configs(entries: list[dict]) -> str:
    """The tiles found, as TABLE's lines, each with what it gained; those of float32 by themselves."""
    lines = []
    for kernel, arch, wide in sorted({_place(entry) for entry in entries}):
        own = sorted((entry for entry in entries if _place(entry) == (kernel, arch, wide)), key=_head_size)
        gains = ", ".join(f"{_head_size(entry)}: {entry['shipped_ms'] / entry['tuned_ms']:.2f}x" for entry in own)
        sizes = ", ".join(f"{_head_size(entry)}: Config({', '.join(map(str, entry['config']))})" for entry in own)
        dtype = ", float32" if wide else ""
        lines.append(f'"{kernel}": {arch}: {{{sizes}}},  # {own[0]["timed"]}{dtype} faster by {gains}')
    return "\n".join(lines)


def _place(entry: dict) -> tuple[str, int, bool]:
    """The kernel, the architecture, and whether it is float32, whose tiles are not the table's."""
    return entry["kernel"], entry["arch"], entry["dtype"] == "float32"


def _head_size(entry: dict) -> int:
    return entry["head_size"]


MEASURED = {
    "acceptance": acceptance,
    "speed": speed,
    "result": result,
    "lossless": lossless,
    "ops": ops,
    "gpu": gpu,
    "compiled": compiled,
    "paper": paper,
    **REPRODUCTION,
    "speedup": speedup,
    "simulation": simulation,
    "literal_simulation": literal_simulation,
}


def filled(page: str) -> str:
    """The page with every table, and every figure in a sentence, between its marks made anew."""

    def measured(match: re.Match) -> str:
        name, line = match.groups()
        if name not in MEASURED:
            raise ValueError(f"<!-- {name} --> names nothing measured; allowed: {', '.join(MEASURED)}")
        return f"<!-- {name} -->{line}{MEASURED[name]()}{line}<!-- end -->"

    return re.sub(r"<!-- (\w+) -->(\n?).*?<!-- end -->", measured, page, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """1 if --check finds a stale table."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    parser.add_argument("--configs", type=Path, metavar="FILE", help="of bench.tuning, or of bench/gpu/check.sh")
    options = parser.parse_args(arguments)
    if options.configs:
        found = json.loads(options.configs.read_text(encoding="utf-8"))
        print(configs(found if isinstance(found, list) else found["steps"]["tune"]["configs"]))
        return 0
    if options.plots:
        from bench.report import plots

        print(*(f"drawn: {path.relative_to(ROOT)}" for path in plots.main()), sep="\n")
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if options.check else 'written'}: {name}" for name in stale) or "up to date")
    return int(bool(stale) and options.check)
