"""How the tests that need a GPU are run there, and what came of them, file by file."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench.processes import ROOT

A_TEST = 150
"""Seconds that one test may take."""
KINDS = ("passed", "failures", "errors", "skipped", "unfinished")


def files() -> list[str]:
    """Test files that hold a test for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if re.search(r"pytest\.mark\.gpu\b", file.read_text())]


def counted(report: Path) -> dict[str, dict[str, int]]:
    """Tests by file and by how they ended, from pytest's JUnit file; one that was running when pytest was stopped has
    no name there, and is under "unfinished" of no file."""
    found: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), "")
        kinds = {"failure": "failures", "error": "errors", "skipped": "skipped"}
        kind = next((kinds[part.tag] for part in case if part.tag in kinds), "passed" if file else "unfinished")
        found.setdefault(file, dict.fromkeys(KINDS, 0))[kind] += 1
    return found


CHOSEN = ["-m", "gpu and not slow"]
"""Not the slow ones, for which half an hour is too short: a search for the best tiles compiles for a minute, and the
step tune makes a wider one; kinds of targets are tried on one path each."""


def options() -> tuple[list[str], list[str]]:
    """Options of pytest's plugins for as many workers as there are cores but two, and what is left out without them.

    The limit of a test kills its worker: a kernel that hangs hears no signal.
    """
    missing = [name for name in ("xdist", "pytest_timeout") if find_spec(name) is None]
    found = [] if "xdist" in missing else ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
    if "pytest_timeout" not in missing:
        found += ["--timeout", str(A_TEST), *([] if "xdist" in missing else ["--timeout-method", "thread"])]
    return found, missing
