"""docs/design.md: its map lists every source file of the tree once, and what it names and what cites it is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
FOLDERS = (".ci", "beagle_kernels", "bench", "csrc", "docs", "python", "tests")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")


def listed(page: str) -> list[tuple[str, str]]:
    """(path, what it is for) of the map's lines: a heading names the folder, each line a file in it."""
    folder, found = "", []
    for line in page.splitlines():
        if heading := re.fullmatch(r"### `(?:\./|(.+/))`", line):
            folder = heading[1] or ""
        elif entry := re.fullmatch(r"- `([^`]+)`: (.+)", line):
            found.append((folder + entry[1], entry[2]))
    return found


def tracked() -> list[Path]:
    """The files of the tree: those that git knows, or all of them in an unpacked archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        known = []
    if known:
        return [ROOT / name for name in known]
    return [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]


def sources() -> set[str]:
    """Paths of all source files that hold anything."""
    return {
        str(path.relative_to(ROOT))
        for path in tracked()
        if path.is_file() and path.stat().st_size and (path.suffix in SUFFIXES or path.parent.name == ".ci")
    }


def headings(page: str) -> set[str]:
    return set(re.findall(r"^#{2,3} (.+)$", page, re.M))


def test_the_map_lists_every_source_file_once():
    paths = [path for path, _ in listed(PAGE)]
    assert len(paths) > 150
    twice = sorted({path for path in paths if paths.count(path) > 1})
    assert not twice, f"listed more than once: {twice}"
    missing, gone = sorted(sources() - set(paths)), sorted(set(paths) - sources())
    assert not missing, f"without a line in docs/design.md, Source map: {missing}"
    assert not gone, f"listed in docs/design.md, Source map, but not in the tree: {gone}"


def test_a_line_is_read_with_its_folder():
    page = "### `./`\n\n- `setup.py`: builds\n\n### `csrc/core/`\n\n- `tree.h`: a tree\n- not a file\n"
    assert listed(page) == [("setup.py", "builds"), ("csrc/core/tree.h", "a tree")]


def test_what_the_code_cites_is_a_heading():
    """Comments and docstrings cite the page as `docs/design.md: HEADING`, in parentheses."""
    cited = {
        (path, heading)
        for path in sorted(sources())
        if path.split("/")[0] in ("beagle_kernels", "csrc", "python", "bench")
        for heading in re.findall(r"docs/design\.md: ([^);.]+)", (ROOT / path).read_text(encoding="utf-8"))
    }
    assert len(cited) > 5
    wrong = sorted((path, heading) for path, heading in cited if heading not in headings(PAGE))
    assert not wrong, f"{wrong}; allowed: {sorted(headings(PAGE))}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|cuh?|h|md|sh))`", PAGE))))
def test_paths_named_on_the_page_exist(path):
    """From the root, or from beagle_sd; X stands for an op."""
    names = [path.replace("X", op) for op in ("tree_attention", "verify_tree", "block_attention")]
    assert any((ROOT / base / name).exists() for base in (".", "python/beagle_sd") for name in names), path
