"""bench/gpu/call.sh: its steps go on after one another whatever becomes of them, and what they made travels."""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import call as gpu_call
from bench.gpu import check as gpu_check
from bench.gpu.call import Call, Step, bring_back, calls, main, take_in
from bench.recipes.one_gpu import __main__ as gpu_train


def script(text: str):
    return lambda seconds: [sys.executable, "-c", text]


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "results.tgz") as tar:
        return set(tar.getnames())


def test_a_step_that_fails_or_hangs_stops_nothing(tmp_path, monkeypatch, capfd):
    work, results = tmp_path / "work", tmp_path / "results"
    writes = f"from pathlib import Path; Path({str(work / 'made.json')!r}).write_text('1'); print('said')"
    steps = [
        Step("crash", script("import os; os.abort()")),
        Step("hang", script("import time; time.sleep(60)"), 1.0),
        Step("last", script(writes)),
    ]
    monkeypatch.setattr(gpu_call, "LEAST", 0.5)
    monkeypatch.setattr(gpu_call, "calls", lambda work, dry: {"all": Call(steps)})
    assert main(["all", str(results), "--work", str(work), "--carried", str(tmp_path / "none")]) == 1
    said = capfd.readouterr().out
    assert "== crash: failed with -6" in said and "== hang: stopped after 1 s" in said
    assert "== last: passed" in said and "said" in said
    assert packed(results) == {"made.json", "log/crash.txt", "log/hang.txt", "log/last.txt"}
    assert main(["all", str(results), "--work", str(work), "--seconds", "0.1"]) == 1
    assert capfd.readouterr().out.count("not begun") == 3


def test_what_is_brought_back_can_be_carried_on(tmp_path):
    """To a machine that has nothing; what a machine has already stays."""
    work, results, fresh = tmp_path / "work", tmp_path / "results", tmp_path / "fresh"
    results.mkdir()
    files = [
        "in/kit.part0",
        "out/kit/about.json",
        "out/scratch/ready",
        "out/search/best.json",
        "out/answers/answers-00.npz",
        "out/answers/answers-01.npz",
        "out/train/draft/model.safetensors",
        "out/train/checkpoint/checkpoint.part0",
        "out/train/checkpoint/checkpoint.json",
        "gpu.json",
    ]
    for name in files:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    bring_back(work, results, ("answers-*.npz", "model.safetensors", "checkpoint.part*"))
    assert {path.name for path in results.iterdir()} == {
        "results.tgz",
        "answers-00.npz",
        "answers-01.npz",
        "model.safetensors",
        "checkpoint.part0",
    }
    (fresh / "out/answers").mkdir(parents=True)
    (fresh / "out/answers/answers-00.npz").write_text("newer")
    list(take_in(results, fresh))
    there = {str(path.relative_to(fresh)): path.read_text() for path in fresh.rglob("*") if path.is_file()}
    assert there == {name: name for name in files[3:]} | {"out/answers/answers-00.npz": "newer"}


@pytest.mark.parametrize(("count", "parts"), [(4, 3), (4, 4), (9, 1)])
def test_no_more_files_than_may_come_back(count, parts, tmp_path, capsys):
    """Answers as far as they fit; a checkpoint only whole."""
    for folder, name, number in (
        ("answers", "answers-0{}.npz", count),
        ("train/checkpoint", "checkpoint.part{}", parts),
    ):
        (tmp_path / "work/out" / folder).mkdir(parents=True)
        for each in range(number):
            (tmp_path / "work/out" / folder / name.format(each)).touch()
    results = tmp_path / "results"
    results.mkdir()
    bring_back(tmp_path / "work", results, ("answers-*.npz", "checkpoint.part*"))
    names = [path.name for path in results.iterdir()]
    assert len(names) <= gpu_call.FILES and sum("answers" in name for name in names) == min(count, 7)
    assert sum("part" in name for name in names) == (3 if parts == 3 else 0)
    assert ("stay in" in capsys.readouterr().out) == (parts != 3)


@pytest.mark.parametrize("dry", [False, True])
def test_the_steps_are_commands_of_this_repository(dry, tmp_path):
    """Where setup has little to do, the limits leave time for the last step; each command's time is its step's."""
    for name, call in calls(tmp_path, dry).items():
        left = gpu_call.SECONDS
        for step in call.steps:
            seconds = min(step.seconds, left)
            left -= 60 if step.name == "setup" else step.seconds
            assert seconds >= 30, (name, step.name)
            command = step.command(seconds)
            assert command[1] == "-m" and command[2].startswith("bench.")
            if command[2] == "bench.recipes.one_gpu":
                options = gpu_train.parsed(command[3:])
                assert options.parts == [step.name] and 60 * options.minutes <= seconds - gpu_call.SAVING + 0.5
            elif command[2] == "bench.gpu.check":
                parts = command[4 : command.index("--seconds")]
                assert {part.partition(":")[0] for part in parts} <= {*gpu_check.SECONDS, "smoke"}


def test_the_page_has_every_call():
    page = (gpu_call.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert set(re.findall(r"bench/gpu/call.sh (\w+) RESULTS", page)) == set(calls(Path(), False))
