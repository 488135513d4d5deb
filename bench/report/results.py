"""The files that hold what was measured, and their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
BUNDLED = ROOT / "python" / "beagle_sd" / "bundled" / "smollm2-135m"


def read(name: str):
    """What a file of bench/results holds."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def speed_rows() -> Iterator[tuple[dict, dict]]:
    """(run, row) of every contender in the CPU's files."""
    for path in sorted(RESULTS.glob("cpu-speed*.json"), key=lambda path: path.stem):
        measured = read(path.name)
        for row in measured["rows"]:
            yield measured, row


def lengths_record() -> dict:
    """What bench.answers.lengths measured on the CPU; one without rows where there is no file."""
    return read("cpu-lengths.json") if (RESULTS / "cpu-lengths.json").exists() else {"rows": []}


def gpu_record() -> dict:
    """The GPU's run as bench/gpu/check.sh wrote it; one without steps where there is none."""
    return read("gpu.json") if (RESULTS / "gpu.json").exists() else {"steps": {}}


def gpu_rows() -> list[dict]:
    """All rows of the GPU's benchmarks."""
    steps = gpu_record()["steps"]
    return [row for name, step in steps.items() if name.startswith("bench") for row in step.get("rows", [])]


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
