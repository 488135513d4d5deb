"""The tables of what this package does itself: acceptance, speed, losslessness, ops and compiled kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench.report import results


def acceptance() -> str:
    """Tokens a round of the bundled draft, greedy beside T = 1."""
    return _acceptance(json.loads((results.BUNDLED / "acceptance.json").read_text(encoding="utf-8")))


def acceptance_elsewhere() -> str:
    """The same of one tree on other sets of prompts, a row a set."""
    lines = [
        "| prompts | tree | tokens a round, greedy | at T = 1 | accepted by depth, greedy |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(results.RESULTS.glob("acceptance-*.json")):
        measured = results.read(path.name)
        lines += [f"| {measured['prompts']} {row}" for row in _acceptance(measured).splitlines()[2:]]
    return "\n".join(lines) if len(lines) > 2 else "not measured"


def _acceptance(measured: dict) -> str:
    sizes = "lookup", "num_nodes", "depth", "branch", "temperature"
    found = {tuple(row.get(size, 0) for size in sizes): row for row in measured["shapes"]}
    lines = ["| tree | tokens a round, greedy | at T = 1 | accepted by depth, greedy |", "|---|---|---|---|"]
    for key in sorted({key[:4] for key in found}):
        lookup, nodes, depth, branch = key
        greedy, sampled = found.get((*key, 0.0)), found.get((*key, 1.0))
        copied = f", {lookup} copied" if lookup else ""
        name = f"chain of {depth}" if branch == 1 else f"{nodes} nodes (depth {depth}, branch {branch}{copied})"
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
    for measured, row in results.speed_rows():
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
    for measured, row in results.speed_rows():
        if (row["prompts"], measured["temperature"]) != ("mt-bench", 0) or "tree of" in row["contender"]:
            continue
        tokens = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
        ratio = f"{row['median']:.2f} ({row['low']:.2f}, {row['high']:.2f})"
        lines.append(f"| {row['contender']} | {row['ms_per_token']:.1f} | {tokens} | {ratio} |")
    return "\n".join(lines)


def lossless() -> str:
    """Tokens compared with the truth, ties of two logits within 1e-3, and faults."""
    lines = ["| sampling | tree | batch | tokens compared | ties | faults |", "|---|---|---|---|---|---|"]
    for row in results.read("lossless.json"):
        cells = (row["sampling"], row["shape"], row["batch"], f"{row['tokens']:,}", row["ties"], row["faults"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ops() -> str:
    """Every op on the CPU beside its fastest peer: medians, and how many times ours is faster."""
    lines = ["| op and shape | ours, µs | fastest peer | its µs | ratio | bound, µs |", "|---|---|---|---|---|---|"]
    for group, rows in results.grouped(results.read("cpu-ops.json")).items():
        if any("error" in row for row in rows):
            lines.append(f"| {group} | refused |  |  |  |  |")
            continue
        ours, peer, time = results.against_fastest(rows)
        bound = ", ".join(f"{row['peer']} {row['p50'] * 1e6:,.0f}" for row in rows if row.get("bound"))
        lines.append(f"| {group} | {ours * 1e6:,.0f} | {peer} | {time * 1e6:,.0f} | {time / ours:.2f}x | {bound} |")
    return "\n".join(lines)


def counts() -> str:
    """What choices read and draw, by the host's code and the CUDA kernels' in the emulator."""
    head = [
        "| logits | sampling | reads a token: CPU | CUDA | Philox a group: CPU | CUDA | looked into: CPU | CUDA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in results.read("counts.json")["counts"]:
        found.setdefault((row["logits"], row["sampling"]), {})[row["executor"]] = row
    shown = {"reads_per_token": ".2f", "philox_calls_per_group": ".2f", "share_of_groups_looked_into": ".2%"}
    for names, by in found.items():
        cells = [f"{by[executor][key]:{style}}" for key, style in shown.items() for executor in ("cpu", "cuda")]
        head.append("| " + " | ".join((*names, *cells)) + " |")
    return "\n".join(head)


def gpu() -> str:
    """Every op on the GPU beside its fastest peer, with its share of the limits measured in the same run."""
    head = [
        "| op and shape | ours, µs | TFLOP/s | share of copy | share of matmul | fastest peer | ratio "
        "| bound, µs (of ours) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    for group, rows in results.grouped(results.gpu_rows()).items():
        if any("error" in row for row in rows):
            lines.append(f"| {group} | refused |  |  |  |  |  |  |")
            continue
        our_row = next(row for row in rows if row["peer"] == "beagle")
        shares = [f"{our_row[name]:.0%}" if name in our_row else "" for name in ("share of copy", "share of matmul")]
        rate = f"{our_row['flop/s'] / 1e12:,.1f}" if "flop/s" in our_row else ""
        bound = ", ".join(
            f"{row['peer']} {row['p50'] * 1e6:,.0f} ({row['p50'] / our_row['p50']:.0%})"
            for row in rows
            if row.get("bound")
        )
        beside = "none was measured", ""  # a run that was stopped after ours
        if len(rows) > 1:
            ours, peer, time = results.against_fastest(rows)
            clock = next(row for row in rows if row["peer"] == peer).get("clock")
            clocks = f" (by {clock}, ours by {our_row['clock']})" if clock != our_row.get("clock") else ""
            beside = peer + clocks, f"{time / ours:.2f}x"
        cells = (group, f"{our_row['p50'] * 1e6:,.1f}", rate, *shares, *beside, bound)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*head, *(lines or ["| every op | not measured |  |  |  |  |  |  |"])])


def compiled() -> str:
    """Every Triton kernel as two versions of the compiler make it: registers and spilt bytes a thread, and the most
    seconds that compiling took."""
    files = sorted(path.name for path in results.RESULTS.glob("compiled-*.json"))
    rows = [row for name in files for row in results.read(name)]
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


def speedup() -> str:
    """Of the adaptive tree over target.generate, greedy: the medians of the sets of prompts, lowest and highest."""
    found = sorted(
        row["median"]
        for measured, row in results.speed_rows()
        if row["contender"] == "beagle, adaptive tree" and measured["temperature"] == 0
    )
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def simulation() -> str:
    return f"{_step_over_stage_1('beagle'):.2f}"


def literal_simulation() -> str:
    return f"{_step_over_stage_1('literal passes'):.1f}"


def _step_over_stage_1(peer: str) -> float:
    """Time of a training step of stage 2, ours or another's, over one of stage 1."""
    groups = results.grouped(results.read("cpu-ops.json"))
    times = {row["peer"]: row["p50"] for row in groups["training step, k = 5, 2048 rows"]}
    return times[peer] / times["stage 1"]


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2f}"


def lengths() -> str:
    """Tokens a round and the draft's share of a round by length of the text, beside those at the shortest."""
    lines = [
        "| text | tokens of it | draft's window | T | tokens a round | of those at the shortest | accepted by depth "
        "| target's certainty | draft, ms a round | round, ms | draft's share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple, float] = {}
    for row in results.lengths_record()["rows"]:
        shortest = first.setdefault((row["kind"], row["window_keys"], row["temperature"]), row["tokens_per_round"])
        cells = (
            row["kind"],
            f"{row['tokens']:,}",
            row["window_keys"] or "all",
            f"{row['temperature']:g}",
            f"{row['tokens_per_round']:.2f}{_plus_minus(row['standard_error'])}",
            f"{row['tokens_per_round'] / shortest:.0%}",
            " ".join(f"{share:.2f}" for share in row["acceptance_by_depth"]),
            f"{row['certainty']:.2f}",
            f"{row['draft_ms']:.1f}",
            f"{row['round_ms']:.1f}",
            f"{row['draft_ms'] / row['round_ms']:.0%}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) if first else "not measured"


def inside_vllm() -> str:
    """What a draft brings inside vLLM on the CPU, beside plain vLLM, n-grams and our own loop."""
    if not (results.RESULTS / "cpu-vllm.json").exists():
        return "not measured"
    lines = [
        "| | texts as plain vLLM's | tokens | rounds | accepted at depth 1, 2, ... | tokens a round | tokens/s "
        "| x plain vLLM, median (20%, 80%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.read("cpu-vllm.json")["rows"]:
        ratio, speed = row["ratio"], row["tokens_per_second"]
        cells = (
            row["contender"],
            f"{row['texts_equal']} of {row['texts']}",
            f"{row['tokens']:,}",
            f"{row['rounds']:,}",
            " ".join(map(str, row["accepted_by_depth"])),
            f"{row['tokens_per_round']:.3f}",
            "" if speed is None else f"{speed:.1f}",
            "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cache_memory() -> str:
    """MiB of the target's cache of one long text, by kind."""
    found = results.read("cache-memory.json")
    lines = [
        "| default config of | layers with keys | of these with a window or chunk | of | whole, MiB "
        f"| in pages of {found['page']}, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        size = f"{row['window']:,}" if row["window"] else ""
        whole, pages = (f"{row[name] / 2**20:,.0f}" for name in ("whole", "pages"))
        cells = row["kind"], f"{row['with_keys']} of {row['layers']}", str(row["with_window"]), size, whole, pages
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "acceptance": acceptance,
    "acceptance_elsewhere": acceptance_elsewhere,
    "lengths": lengths,
    "speed": speed,
    "result": result,
    "lossless": lossless,
    "inside_vllm": inside_vllm,
    "ops": ops,
    "counts": counts,
    "cache_memory": cache_memory,
    "gpu": gpu,
    "compiled": compiled,
    "speedup": speedup,
    "simulation": simulation,
    "literal_simulation": literal_simulation,
}
"""By the name that the pages have: tables, and figures within a sentence."""
