"""What users of packages like this one report, tried here: python tests/cases/run.py [NAME ...]

Each case is a script of its own, which exits with 0 where it finds what its docstring expects. They run one after
another, each in a process of its own under a time limit. A line each as it ends, with the end of its output where it
failed; the exit status is 1 if one did. What needs a package that is not installed is skipped, and says so.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
HELPERS = ROOT / "tests" / "helpers"
"""Small models, which cases share with the tests."""
SECONDS = 900.0
SKIPPED = 77
"""The exit status of a script that lacks something; its last line says what."""
TAIL = 2000
PACKAGES = {"optimum": "optimum-quanto"}
"""What pip calls a module, where that differs."""


class Until(NamedTuple):
    """What a case must end with while the work that it waits for is not done: an exit status, and words it prints."""

    status: int
    words: str


UNTIL = {
    "chat_multi_turn": Until(1, "keys of an earlier turn: refused"),
    "mla_targets": Until(0, "has latent attention"),
    "hf_settings": Until(0, "bad_words_ids (two tokens)     ValueError"),
}
"""Text of several turns keeps no keys, latent attention is not read, and words of several tokens are not forbidden."""


def cases(folder: Path = FOLDER) -> dict[str, Path]:
    """Every script below the folder's own level, by its name."""
    return {path.stem: path for path in sorted(folder.glob("*/*.py"))}


def missing(script: Path) -> list[str]:
    """What the script imports, anywhere in it, that is not installed here, as pip calls it."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names if not name.startswith("beagle")}
    tops -= {path.stem for path in HELPERS.glob("*.py")}
    return sorted(PACKAGES.get(name, name) for name in tops if importlib.util.find_spec(name) is None)


def tried(script: Path, seconds: float) -> tuple[str, str]:
    """("passed", "failed" or "skipped", what there is to say)."""
    if lacking := missing(script):
        return "skipped", f"needs {', '.join(lacking)}: pip install {' '.join(lacking)}"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths())},
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # what it started too, and when this process is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read().rstrip()
    return verdict(script.stem, status, output, seconds)


def verdict(name: str, status: int | None, output: str, seconds: float) -> tuple[str, str]:
    """What a script's end means; status None where it was stopped."""
    if status == SKIPPED:
        return "skipped", output.rpartition("\n")[2]
    wanted = UNTIL.get(name, Until(0, ""))
    if status == wanted.status and wanted.words in output:
        return "passed", f"as long as this is not done: {wanted.words}" if name in UNTIL else ""
    why = f"stopped after {seconds:g} s" if status is None else f"exit status {status}"
    if status == wanted.status:
        why += f", without the words {wanted.words!r}"
    return "failed", f"{why}\n{output[-TAIL:]}"


def paths() -> list[str]:
    """This checkout's packages and helpers first, and absolute: some cases change their folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [str(ROOT), str(ROOT / "python"), str(HELPERS), *(os.path.abspath(path) for path in given if path)]


def main(arguments: list[str]) -> int:
    """1 if a case failed."""
    parser = argparse.ArgumentParser(
        prog="python tests/cases/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases or of their folders; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a case's limit (default {SECONDS:g})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they are (default: beside this file)")
    options = parser.parse_intermixed_args(arguments)
    known = cases(options.folder)
    groups = {path.parent.name for path in known.values()}
    if unknown := [name for name in options.names if name not in known and name not in groups]:
        parser.error(f"no case {', '.join(unknown)}; allowed: {', '.join([*sorted(groups), *known])}")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name, script in known.items():
        if options.names and name not in options.names and script.parent.name not in options.names:
            continue
        began = time.monotonic()
        outcome, say = tried(script, options.seconds)
        counts[outcome] += 1
        print(f"{outcome:7} {script.parent.name}/{name}, {time.monotonic() - began:.0f} s", end="", flush=True)
        print(f": {say}" if say else "", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), flush=True)
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
