"""`python -m bench --base REF`: the ratio of each of our rows, turn by turn, and what cannot be compared says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import base
from bench.__main__ import main, parsed, rows_of

ROOT = Path(__file__).resolve().parents[2]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def row(seconds: float, peer: str = "beagle") -> dict:
    return {"group": "an op", "peer": peer, "p50": seconds}


def test_the_ratio_is_the_median_of_the_turns():
    turns = [{"base": [row(base)], "here": [row(here)]} for base, here in ((6.0, 2.0), (4.0, 4.0), (5.0, 2.5))]
    (found,) = base.ratios(turns)
    assert (found["base"], found["here"], found["ratio"], found["low"], found["high"]) == (5.0, 2.5, 2.0, 1.0, 3.0)
    assert (
        base.line(found | {"base": 5e-6, "here": 25e-7}) == "an op\n  base 5.0 us   here 2.5 us   2.00x (1.00 to 3.00)"
    )


def test_a_row_that_one_side_lacks_names_the_side():
    wrong = {"group": "an op", "peer": "beagle", "error": "AssertionError: off by 1"}
    turns = [{"base": [wrong], "here": [row(1.0), row(2.0, "beagle plain")]}, {"base": [], "here": [row(1.0)]}]
    one, other = base.ratios(turns)
    assert one["error"] == "base: AssertionError: off by 1"
    assert other["error"] == "base: has no such row; here: has no such row"
    assert base.line(other) == "an op, beagle plain\n  base: has no such row; here: has no such row"


def test_only_our_own_are_timed():
    rows = list(rows_of("tree_attention", "cpu", "tiny", [], peers="none"))
    assert {row["peer"] for row in rows} == {"beagle", "beagle alone"} and all("p50" in row for row in rows)


@needs_git
def test_a_ref_that_is_no_commit_is_named(capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are in no git checkout")
    assert main(["build_tree", "--size", "tiny", "--base", "no/such/branch"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "error: --base is 'no/such/branch', which names no commit here; allowed: a branch, a tag or a hash\n"
    )


@needs_git
def test_without_a_checkout_or_git_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["build_tree", "--base", "main"]) == 2
    assert capsys.readouterr().err == f"error: --base needs a git checkout, and {tmp_path} is none\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["build_tree", "--base", "main"]) == 2
    assert capsys.readouterr().err == "error: --base needs git, which is not installed here\n"


BUILDS = """
import os
from pathlib import Path
Path("beagle_kernels/_C.x.so").write_text(os.environ["BEAGLE_CUDA"])
"""


@pytest.fixture
def changed(monkeypatch, tmp_path):
    """The other commit's tree, whose csrc differs from the one here."""
    for root in ("here", "there"):
        (tmp_path / root / "beagle_kernels").mkdir(parents=True)
    (tmp_path / "here" / "beagle_kernels" / "_C.x.so").write_text("built here")
    monkeypatch.setattr(base, "ROOT", tmp_path / "here")
    monkeypatch.setattr(base, "git", lambda *arguments: "csrc/a.cpp" if arguments[0] == "diff" else "")
    monkeypatch.delenv("BEAGLE_CUDA", raising=False)
    return tmp_path / "there"


def test_other_sources_are_built_there(changed, capsys):
    (changed / "setup.py").write_text(BUILDS)
    base.give_extension(changed, "abc", "cpu")
    assert (changed / "beagle_kernels" / "_C.x.so").read_text() == "0" and "building" in capsys.readouterr().out


def test_what_does_not_build_is_shown(changed):
    (changed / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(base.BaseError, match="the extension of abc does not build:\nno compiler"):
        base.give_extension(changed, "abc", "cpu")


def test_the_same_sources_and_no_extension_are_not_built(changed, monkeypatch):
    monkeypatch.setattr(base, "git", lambda *arguments: "")
    base.give_extension(changed, "abc", "cpu")
    built = changed / "beagle_kernels" / "_C.x.so"
    assert built.read_text() == "built here"
    built.unlink()
    (base.ROOT / "beagle_kernels" / "_C.x.so").unlink()
    base.give_extension(changed, "abc", "cpu")
    assert not built.exists()


def test_base_does_not_go_on(capsys):
    with pytest.raises(SystemExit):
        parsed(["--base", "main", "--go-on"])
    assert "--base and --go-on were given; allowed: one of them" in capsys.readouterr().err


@pytest.fixture
def repository(tmp_path):
    """A repository of this tree whose first commit has a slow build_tree and whose second is tagged `fast`."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=copy, check=True, capture_output=True)

    copy = tmp_path / "copy"
    for name in ("beagle_kernels", "python/beagle_sd", "bench", "csrc"):
        left_out = ("__pycache__", *(("results", "data") if name == "bench" else ()))
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*left_out))
    for name in ("setup.py", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    op = copy / "beagle_kernels" / "build_tree.py"
    fast = op.read_text()
    first = '    checks.tensor("build_tree", "root", '
    slow = fast.replace(first, f'    __import__("time").sleep(0.02)\n{first}')
    assert slow != fast
    git("init", "--quiet")
    op.write_text(slow)
    git("add", "-A")
    git("commit", "--quiet", "-m", "slow")
    git("tag", "slow")
    op.write_text(fast)
    git("commit", "--quiet", "-am", "fast")
    return copy


@needs_git
@pytest.mark.slow
def test_another_commit_is_measured_beside_this_one(repository, tmp_path):
    """With the extension that is here, since its sources are the same; nothing is left behind."""
    command = [sys.executable, "-m", "bench", "build_tree", "--size", "tiny", "--base", "slow"]
    environment = os.environ | {"PYTHONPATH": f"{repository}:{repository}/python", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json")],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "rows.json").read_text())
    assert found["base"] > 0.02 > found["here"] and found["ratio"] > 2 and found["ref"] == "slow"
    assert "building" not in done.stdout and re.search(r"base 2\d,\d{3}\.\d us +here .* us +\d+\.\d\dx", done.stdout)
    left = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1 and not list((tmp_path / "tmp").glob("beagle-base-*"))
