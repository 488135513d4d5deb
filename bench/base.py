"""`python -m bench --base REF`: our own rows beside those of another commit, measured in turn on this machine.

The commit is checked out into a temporary git worktree with an extension of its own, built there unless csrc and
setup.py are the same here. Both sides run the cases of this tree's bench folder, each file in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.environment import device_name, native_arch, versions
from bench.processes import ROOT

TURNS = 3
"""How often each side runs a file; who begins alternates."""
EXTENSION = ("csrc", "setup.py")
"""What the extension is built from."""
NOT_COPIED = ("__pycache__", "results", "data")
"""Of the bench folder: what no case reads."""
TAIL = 2000


class BaseError(Exception):
    """The other commit cannot be had or built; the message says why."""


def compare(
    ref: str, names: list[str], device: str, size: str, tuned: Path | None = None, out: Path | None = None
) -> int:
    """Print each of our rows with its ratio, also as JSON into `out`; 1 if a row is without a number on either side.

    Raises BaseError if `ref` is no commit, git is missing, or its extension does not build.
    """
    results: list[dict] = []
    with checkout(ref, device) as tree, tempfile.TemporaryDirectory() as scratch:
        print(f"base: {ref}, {git('rev-parse', '--short', ref)}; {device_name(device)}")
        print(f"medians; x: how many times faster this tree is, the median of {TURNS} turns (lowest to highest)")
        for name in names:
            turns = []
            for turn in range(TURNS):
                sides = {"base": tree, "here": ROOT}
                order = sorted(sides, reverse=bool(turn % 2))
                options = [name, device, size, *([str(tuned.resolve())] if tuned else [])]
                turns.append({side: rows_in(sides[side], options, Path(scratch)) for side in order})
            for row in ratios(turns):
                print(line(row), flush=True)
                results.append(row | {"ref": ref, "device": device_name(device)} | versions("torch"))
            if out:
                from beagle_sd.files import write_json

                write_json(out, results)
    return int(any("error" in row for row in results))


def git(*arguments: str) -> str:
    """What git prints; BaseError with what it complains of."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BaseError("--base needs git, which is not installed here") from None
    if done.returncode:
        raise BaseError(f"git {' '.join(arguments)}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return done.stdout.strip()


def commit_of(ref: str) -> str:
    """The hash of the commit that `ref` names in this checkout."""
    try:
        top = git("rev-parse", "--show-toplevel")
    except BaseError as error:
        if "not installed" in str(error):
            raise
        top = None
    if top is None or not ROOT.samefile(top):
        raise BaseError(f"--base needs a git checkout, and {ROOT} is none")
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except BaseError:
        raise BaseError(f"--base is {ref!r}, which names no commit here; allowed: a branch, a tag or a hash") from None


@contextmanager
def checkout(ref: str, device: str) -> Iterator[Path]:
    """A temporary worktree of that commit, with this tree's bench folder and an extension for the commit's sources."""
    commit = commit_of(ref)
    with tempfile.TemporaryDirectory(prefix="beagle-base-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns(*NOT_COPIED))
            give_extension(tree, commit, device)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def give_extension(tree: Path, commit: str, device: str) -> None:
    """This tree's extension where it is built from the same sources, else one built there; none where this tree has
    none, so that like is compared with like."""
    built = list((ROOT / "beagle_kernels").glob("_C.*.so"))
    if not built:
        return
    changed = git("diff", "--name-only", commit, "--", *EXTENSION)
    if not changed and not git("ls-files", "--others", "--exclude-standard", "--", *EXTENSION):
        for file in built:
            shutil.copy2(file, tree / "beagle_kernels")
        return
    print("base: building its extension", flush=True)
    chosen = {"BEAGLE_CUDA": "1", "BEAGLE_CUDA_ARCHS": native_arch()} if device == "cuda" else {"BEAGLE_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=chosen | os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BaseError(f"the extension of {commit} does not build:\n{(done.stdout + done.stderr)[-TAIL:]}")


def rows_in(root: Path, options: list[str], scratch: Path) -> list[dict]:
    """Our rows of one file, measured by the packages below `root`, in a process of its own."""
    file, log = scratch / "rows.json", scratch / "log.txt"
    file.unlink(missing_ok=True)
    paths = [str(root), str(root / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "bench.base", str(file), *options],
            cwd=root,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if file.exists():
        return json.loads(file.read_text())
    why = f"ended with {done.returncode}: {log.read_text(errors='replace')[-TAIL:].strip()}"
    return [{"group": options[0], "peer": "beagle", "error": why}]


def ratios(turns: list[dict[str, list[dict]]]) -> Iterator[dict]:
    """A row for each of our own: median seconds of either side, and the base's over this tree's, turn by turn; or
    "error", which names the side without a number."""
    keys = {(row["group"], row["peer"]): None for turn in turns for rows in turn.values() for row in rows}
    for group, peer in keys:
        found: dict[str, list[float]] = {"base": [], "here": []}
        errors: dict[str, str] = {}
        for turn in turns:
            for side, seconds in found.items():
                row = next((row for row in turn[side] if (row["group"], row["peer"]) == (group, peer)), {})
                if "p50" in row:
                    seconds.append(row["p50"])
                else:
                    reasons = (row[kind] for kind in ("error", "refused", "skipped") if kind in row)
                    errors.setdefault(side, next(reasons, "has no such row"))
        if errors:
            yield {"group": group, "peer": peer, "error": "; ".join(f"{side}: {why}" for side, why in errors.items())}
            continue
        each = [base / here for base, here in zip(found["base"], found["here"], strict=True)]
        medians = {side: statistics.median(seconds) for side, seconds in found.items()}
        spread = {"ratio": statistics.median(each), "low": min(each), "high": max(each)}
        yield {"group": group, "peer": peer, **medians, **spread}


def line(row: dict) -> str:
    """A row for a reader."""
    name = row["group"] if row["peer"] == "beagle" else f"{row['group']}, {row['peer']}"
    if "error" in row:
        return f"{name}\n  {row['error']}"
    times = "   ".join(f"{side} {row[side] * 1e6:,.1f} us" for side in ("base", "here"))
    return f"{name}\n  {times}   {row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"


def main(arguments: list[str]) -> None:
    """Of the process that `rows_in` starts: FILE NAME DEVICE SIZE [TUNED]."""
    from bench.__main__ import rows_of

    file, name, device, size, *tuned = arguments
    if tuned:
        from bench.tuning import use

        use(json.loads(Path(tuned[0]).read_text()))
    rows = list(rows_of(name, device, size, [], peers="none"))
    Path(file).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
