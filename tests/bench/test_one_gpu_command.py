"""bench/recipes/one_gpu.sh as a command: its arguments, its status, its page, and what its parts are measured by."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.recipes.one_gpu.__main__ import PARTS, main, parsed, parsed_kit
from bench.recipes.one_gpu.evaluate import in_turn
from bench.recipes.one_gpu.job import Budget, OutOfTime
from bench.recipes.one_gpu.recipe import BASE
from bench.recipes.one_gpu.search import CHOICES
from bench.recipes.one_gpu.setup import deviations
from bench.recipes.one_gpu.training import chain_tokens

ROOT = Path(__file__).resolve().parents[2]


def test_the_status_of_several_parts(monkeypatch, tmp_path, capsys):
    """Whatever one ends with, also by a signal (-11) or at its limit (None), the next begins, with the same options."""
    begun: list[tuple] = []
    codes: dict[str, int | None] = {}

    def end(arguments, seconds):
        begun.append((arguments[1], arguments[2:], seconds))
        return codes[arguments[1]]

    monkeypatch.setattr("bench.recipes.one_gpu.__main__.in_process", end)
    for ends, status in (
        ({"answers": 0, "train": 0}, 0),
        ({"answers": 3, "train": 0}, 3),
        ({"answers": 2, "train": 3}, 2),
        ({"answers": -11, "train": 3}, 1),
        ({"answers": None, "train": 0}, 1),
    ):
        begun.clear()
        codes.update(ends)
        assert main([str(tmp_path), "answers", "train", "--minutes", "2", "--toy"]) == status
        assert begun == [(part, ["--minutes", "2.0", "--toy"], 180.0) for part in ("answers", "train")]
    said = capsys.readouterr().err
    assert "answers: it ended with -11" in said and "answers: its time ran out" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake"], "part 'bake'; allowed: setup, answers, search, train, evaluate, eagle2"),
        (["setup"], "setup needs --kit FOLDER"),
        (["train", "--minutes", "0"], "--minutes is 0.0; allowed: above 0"),
        (["train", "--batch", "-4"], "--batch is -4; allowed: above 0"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["kit", str(tmp_path), "--sources", "novels"]) == 2
    assert "sources ['novels'] and part_mib 46 were given; allowed: some of ['chatterbot" in capsys.readouterr().err


def test_the_commands_of_the_page_are_the_scripts_own():
    lines = re.findall(r"^(?:\| `)?bench/recipes/one_gpu.sh ([^`\n]*)", (ROOT / "docs" / "gpu.md").read_text(), re.M)
    assert {part for words in map(str.split, lines) for part in words} >= {"kit", *PARTS}
    for words in map(str.split, lines):
        assert parsed_kit(words[1:]) if words[0] == "kit" else set(parsed(words).parts) <= set(PARTS)


def test_only_what_differs_from_the_cpu_is_named():
    on_cpu = [2.0, 0.5, 3.0, 1.0]
    assert deviations([2.05, 0.48, 3.1, 1.0], on_cpu) == {}
    assert deviations([2.0, 0.6, float("nan"), 1.0], on_cpu).keys() == {"gradient norm of stage 1", "loss of stage 2"}


def test_what_is_asked_of_a_draft_is_measured_first():
    assert in_turn()[:2] == [("mt-bench", 0.0, "4,6,16"), ("mt-bench", 0.0, "6,10,60")]
    assert len(set(in_turn())) == len(in_turn())


def test_the_budget_and_the_measure():
    with pytest.raises(OutOfTime):
        Budget(1.0).need(60.0)
    Budget(1.0).need(50.0)
    assert chain_tokens([0.5, 0.5, 1.0]) == 2.0 and chain_tokens([]) == 1.0


def test_the_choices_are_changes_of_the_recipe():
    changes = [change for _, group in CHOICES for change in group]
    assert all(
        set(change) <= set(BASE) and any(BASE[name] != value for name, value in change.items()) for change in changes
    )
    assert len({json.dumps(change) for change in changes}) == len(changes)
