"""tests/cases/run.py: each script's end is told as what it means, and no script ends the others."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "cases"
SPEC = importlib.util.spec_from_file_location("run_cases", FOLDER / "run.py")
assert SPEC is not None and SPEC.loader is not None
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)

SCRIPTS = {
    "passes": "import os, sys\nassert any(os.path.isdir(path + '/beagle_kernels') for path in sys.path)",
    "fails": "print('other tokens')\nraise SystemExit(1)",
    "hangs": "import time\nprint('begun', flush=True)\ntime.sleep(60)",
    "lacks": "def later():\n    from no_such_package.part import thing",
    "wants": "print('needs TF457, a folder')\nraise SystemExit(77)",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "group").mkdir()
    for name, text in SCRIPTS.items():
        (tmp_path / "group" / f"{name}.py").write_text(text)
    return tmp_path


def test_each_end_is_told_and_one_failure_is_enough(folder, capsys):
    assert run.main(["--folder", str(folder), "--seconds", "1"]) == 1
    told = capsys.readouterr().out
    assert "failed  group/fails" in told and "exit status 1\nother tokens\n" in told
    assert "failed  group/hangs" in told and "stopped after 1 s\nbegun\n" in told
    assert "skipped group/lacks" in told and ": needs no_such_package: pip install no_such_package\n" in told
    assert "skipped group/wants" in told and ": needs TF457, a folder\n" in told
    assert "passed  group/passes" in told and told.endswith("1 passed, 2 failed, 2 skipped\n")


def test_cases_are_chosen_by_name_and_by_folder(folder, capsys):
    assert run.main(["--folder", str(folder), "passes", "wants"]) == 0
    assert capsys.readouterr().out.endswith("1 passed, 0 failed, 1 skipped\n")
    with pytest.raises(SystemExit):
        run.main(["--folder", str(folder), "pass"])
    assert "no case pass; allowed: group, fails, hangs, lacks, passes, wants" in capsys.readouterr().err


def test_what_waits_for_later_work_must_end_as_said(monkeypatch):
    monkeypatch.setitem(run.UNTIL, "later", run.Until(1, "refused"))
    assert run.verdict("later", 1, "it is refused", 9)[0] == "passed"
    assert run.verdict("later", 1, "a crash", 9) == ("failed", "exit status 1, without the words 'refused'\na crash")
    assert run.verdict("later", 0, "it is refused", 9)[0] == "failed"


def test_every_case_says_what_it_expects():
    known = run.cases()
    assert len(known) > 40 and run.UNTIL.keys() < known.keys()
    for name, path in known.items():
        assert "\nExpected: " in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""), name
