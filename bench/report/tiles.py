"""Tiles that tuning found, as lines of beagle_kernels/triton/configs.py."""

from __future__ import annotations


def lines_of(entries: list[dict]) -> str:
    """The tiles found, as TABLE's lines, each with what it gained; those of float32 by themselves."""
    lines = []
    for kernel, arch, wide in sorted({_table_key(entry) for entry in entries}):
        same = sorted((entry for entry in entries if _table_key(entry) == (kernel, arch, wide)), key=_head_size)
        gains = ", ".join(f"{_head_size(entry)}: {entry['shipped_ms'] / entry['tuned_ms']:.2f}x" for entry in same)
        sizes = ", ".join(f"{_head_size(entry)}: Config({', '.join(map(str, entry['config']))})" for entry in same)
        dtype = ", float32" if wide else ""
        lines.append(f'"{kernel}": {arch}: {{{sizes}}},  # {same[0]["timed"]}{dtype} faster by {gains}')
    return "\n".join(lines)


def entries_of(steps: dict[str, dict]) -> list[dict]:
    """What the steps of a GPU's run found: the whole search, or the first of it where that is all there was."""
    return max((steps.get(name, {}).get("configs", []) for name in ("tune:first", "tune")), key=len)


def _table_key(entry: dict) -> tuple[str, int, bool]:
    """The kernel, the architecture, and whether it is float32, whose tiles are not the table's."""
    return entry["kernel"], entry["arch"], entry["dtype"] == "float32"


def _head_size(entry: dict) -> int:
    return entry["head_size"]
