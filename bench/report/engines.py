"""Whole answers by the engines that people use on a CPU, as `bench.engines` measured them: docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable

from bench.report import results

BASELINE = "transformers fp32"
SETS = {"mt-bench": "chat", "humaneval": "code", "gsm8k": "maths"}
FEW = {
    BASELINE: "transformers, `target.generate`",
    "llama.cpp native fp32": "llama.cpp, compiled for the processor",
    "llama.cpp wheel fp32": "llama.cpp, wheel",
    "OpenVINO fp32, lookup": "OpenVINO GenAI, prompt lookup",
    "onnxruntime fp32": "onnxruntime-genai",
    "beagle plain fp32": "beagle, plain",
    "beagle adaptive fp32": "beagle, adaptive tree",
    "OpenVINO int8, lookup": "OpenVINO GenAI, prompt lookup, int8",
    "llama.cpp native q8_0": "llama.cpp, q8_0",
    "onnxruntime int4": "onnxruntime-genai, int4",
    "beagle adaptive int8": "beagle, adaptive tree, int8",
}
"""The rows of the short table, and what they are called there; those that a run left out are not shown."""


def engines() -> str:
    """Every contender on every set of prompts, a run a number of threads."""
    lines = [
        "| threads | prompts | engine | ms a token | after the first | x transformers fp32, median (20%, 80%) "
        "| 95% lower bound | equal | ours over it (95% lower bound) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in _records():
        for row in found["rows"]:
            cells = [str(found["threads"]), row["prompts"], row["contender"]]
            lines.append("| " + " | ".join([*cells, *_cells(found, row)]) + " |")
    return "\n".join(lines) if len(lines) > 2 else "not measured"


def _cells(found: dict, row: dict) -> list[str]:
    """The numbers of a row, or why it has none."""
    if "why" in row:
        return [f"not measured: {row['why']}".replace("|", "\\|"), "", "", "", "", ""]
    ratio, decode = row["over"][BASELINE], row["decode_ms_per_token"]
    return [
        f"{row['ms_per_token']:.1f}",
        "" if decode is None else f"{decode:.1f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})",
        _bound(ratio),
        f"{row['equal']} of {row['answers']}",
        _ours_over(found, row),
    ]


def _ours_over(found: dict, rival: dict) -> str:
    """How many times as fast as a rival our adaptive tree is with weights of its kind, int8 for all below 16 bits."""
    weights = next((kind for kind in ("fp32", "bf16") if kind in rival["contender"]), "int8")
    own = _row(found, rival["prompts"], f"beagle adaptive {weights}")
    ratio = (own or {}).get("over", {}).get(rival["contender"])
    return f"{ratio['median']:.2f} ({_bound(ratio)})" if ratio else ""


def _bound(ratio: dict) -> str:
    return "" if ratio["bound"] is None else f"{ratio['bound']:.2f}"


def engines_run() -> str:
    """What the runs were made on, and by which versions."""
    lines = []
    for found in _records():
        pairs = {pair for versions in found["versions"].values() for pair in versions.items()}
        versions = ", ".join(" ".join(pair) for pair in sorted(pairs))
        threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        idle = max((share for share in found["idle"].values() if share is not None), default=0.0)
        lines.append(
            f"- {threads} of {found['processor']}, `{found['command']}`: {versions}. Of a core, a process used at most "
            f"{idle:.1%} while another was timed."
        )
    return "\n".join(lines) or "not measured"


def engines_few() -> str:
    """The short table: ms a token and times transformers by kind of prompt, of the run with most threads."""
    record = _most_threads()
    sets = _sets(record) if record else []
    lines = [f"| ms a token (x transformers) | {' | '.join(SETS[one] for one in sets)} | equal |"]
    lines.append("|" + "---|" * (len(sets) + 2))
    for name, shown in FEW.items() if record else ():
        rows = [row for prompts in sets if record and (row := _row(record, prompts, name)) and "why" not in row]
        if len(rows) < len(sets):
            continue
        cells = [f"{row['ms_per_token']:.1f} ({row['over'][BASELINE]['median']:.2f})" for row in rows]
        equal = f"{sum(row['equal'] for row in rows)} of {sum(row['answers'] for row in rows)}"
        lines.append(f"| {' | '.join([shown, *cells, equal])} |")
    return "\n".join(lines) if len(lines) > 2 else "not measured"


def engines_speedup() -> str:
    """How many times as fast as `target.generate` the adaptive tree is, over the sets of prompts."""
    record = _most_threads()
    if record is None:
        return "not measured"
    rows = [_row(record, prompts, "beagle adaptive fp32") for prompts in _sets(record)]
    ratios = sorted(row["over"][BASELINE]["median"] for row in rows if row and "why" not in row)
    return f"{ratios[0]:.1f}" if ratios[-1] - ratios[0] < 0.05 else f"{ratios[0]:.1f} to {ratios[-1]:.1f}"


def _most_threads() -> dict | None:
    return max(_records(), key=lambda record: record["threads"], default=None)


def _sets(record: dict) -> list[str]:
    """The sets of prompts of a run, in the order of SETS."""
    return [prompts for prompts in SETS if any(row["prompts"] == prompts for row in record["rows"])]


def _row(found: dict, prompts: str, name: str) -> dict | None:
    return next((row for row in found["rows"] if (row["prompts"], row["contender"]) == (prompts, name)), None)


def _records() -> list[dict]:
    """The runs there are, by their file's name."""
    return [results.read(path.name) for path in sorted(results.RESULTS.glob("engines-*.json"))]


TABLES: dict[str, Callable[[], str]] = {
    "engines": engines,
    "engines_run": engines_run,
    "engines_few": engines_few,
    "engines_speedup": engines_speedup,
}
"""By the name that the pages have."""
