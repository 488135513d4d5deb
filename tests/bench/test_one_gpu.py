"""bench/recipes/one_gpu.sh from kit to measured draft at toy size: it resumes, keeps its time, says what is missing."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_files import ROWS, write_set
from models import small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd import BeagleDraft
from beagle_sd.data.answers import write_answers
from beagle_sd.data.conversations import stored_answers
from bench.recipes.one_gpu.__main__ import PARTS, main
from bench.recipes.one_gpu.eagle2 import RUNS, SHAPES
from bench.recipes.one_gpu.job import Budget
from bench.recipes.one_gpu.recipe import BASE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A small target's kit, made without a network."""
    folder = tmp_path_factory.mktemp("kit")
    small_target().save_pretrained(folder / "model")
    small_tokenizer().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, row in ROWS.items():
            write_set(folder / "cache" / "beagle_sd" / "prompts", name, row)
        arguments = ["--target", str(folder / "model"), "--count", "24", "--sources", "templates", "--part-mib", "1"]
        assert main(["kit", str(folder / "parts"), *arguments]) == 0
    return folder / "parts"


def toy(out: Path, *arguments: str) -> int:
    """The script's parts one after the other, in this process, leaving the interpreter as it was."""
    path, cache = list(sys.path), os.environ.get("BEAGLE_CACHE")
    precision = torch.get_float32_matmul_precision()
    parts = [word for word in arguments if word in PARTS]
    options = [word for word in arguments if word not in PARTS]
    try:
        return max(main([str(out), part, *options, "--toy", "--device", "cpu"]) for part in parts)
    finally:
        sys.path[:] = path
        torch.set_float32_matmul_precision(precision)
        os.environ.pop("BEAGLE_CACHE")
        if cache is not None:
            os.environ["BEAGLE_CACHE"] = cache


@pytest.fixture(scope="module")
def answered(kit, tmp_path_factory):
    """An OUT with its kit and its answers."""
    out = tmp_path_factory.mktemp("out")
    assert toy(out, "setup", "answers", "--kit", str(kit)) == 0
    return out


def record(out: Path, part: str) -> dict:
    return json.loads((out / part / "record.json").read_text())


def answers_of(out: Path) -> dict:
    """(prompt, temperature) -> ids, over all files."""
    found = {}
    for path in sorted((out / "answers").glob("answers-*.npz")):
        stored = stored_answers(path)
        for ids, index, t in zip(
            np.split(stored["ids"], stored["lengths"].cumsum()[:-1]), stored["index"], stored["temperature"]
        ):
            key = int(index), round(float(t), 3)
            assert key not in found
            found[key] = ids.tolist()
    return found


def test_the_kit_is_in_small_parts(kit):
    about = json.loads((kit / "kit.json").read_text())
    assert about["parts"] >= 1 and all(path.stat().st_size <= 1 << 20 for path in kit.iterdir())


def test_setup_tries_every_step(answered):
    found = record(answered, "setup")
    assert found["finished"] and found["drafted_equals_plain"] and found["answers"] == 8
    assert len(found["losses"]) == 4 and all(value > 0 for value in found["losses"])
    assert found["environment"]["torch"] == torch.__version__ and found["peak_bytes"] is None


def test_every_prompt_is_answered_at_every_temperature(answered):
    found = answers_of(answered)
    assert {t for _, t in found} == {0.0, 0.7, 1.0}
    assert len(found) == record(answered, "answers")["answers"] >= 45
    files = sorted(path.name for path in (answered / "answers").glob("*.npz"))
    assert files == [f"answers-{number:02d}.npz" for number in range(len(files))] and len(files) > 3
    assert toy(answered, "answers") == 0 and answers_of(answered) == found, "nothing is written twice"


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by a second each time it is read, so that --minutes counts readings."""
    monkeypatch.setattr(Budget, "clock", itertools.count().__next__)


def test_stopped_answers_go_on_to_the_same(answered, ticks, tmp_path):
    (tmp_path / "kit").symlink_to(answered / "kit")
    tries = 0
    while (code := toy(tmp_path, "answers", "--minutes", "0.4")) == 3:
        assert not record(tmp_path, "answers")["finished"]
        tries += 1
        assert tries < 9
    assert code == 0 and tries > 1 and answers_of(tmp_path) == answers_of(answered)


@pytest.mark.slow
def test_from_answers_to_a_measured_draft(answered, monkeypatch):
    monkeypatch.setattr(
        "bench.recipes.one_gpu.search.CHOICES", [(1.0, [{"lr": 1e-3}, {"lr": 1e6}]), (1.0, [{"mlp": 2}])]
    )
    assert toy(answered, "search", "train", "evaluate", "--minutes", "3", "--train-minutes", "0.05") == 0
    runs = json.loads((answered / "search" / "runs.json").read_text())
    best = json.loads((answered / "search" / "best.json").read_text())
    assert [row["change"] for row in runs] == [{}, {"lr": 1e-3}, {"lr": 1e6}, {"mlp": 2}]
    assert best["chain_tokens"] == max(row["chain_tokens"] for row in runs)
    table = (answered / "search" / "table.md").read_text().splitlines()
    assert len(table) == 6 and table[2].startswith("| base |") and table[2].endswith("| yes |")
    plan = record(answered, "train")["plan"]
    assert plan["settings"] == best["settings"] and record(answered, "train")["step"] == plan["steps"] >= 2
    draft = BeagleDraft.from_pretrained(answered / "train" / "draft")
    assert draft.config.draft_vocab_size == 97
    for name, shapes in (("mt-bench", 6), ("humaneval", 3), ("gsm8k", 3)):
        found = json.loads((answered / "evaluate" / f"{name}.json").read_text())
        rows = [(row["temperature"], row["num_nodes"], row["depth"]) for row in found["shapes"]]
        assert len(set(rows)) == len(rows) == 2 * shapes and found["count"] == 1
        assert all(row["tokens_per_round"] >= 1 for row in found["shapes"])
    before = (answered / "evaluate" / "mt-bench.json").read_text()
    assert toy(answered, "evaluate", "--minutes", "0.001") == 0, "measured rows are not measured again"
    assert (answered / "evaluate" / "mt-bench.json").read_text() == before
    for path in answered.glob("[!ks]*/**/*"):
        assert path.stat().st_size < 16 << 20


@pytest.mark.parametrize("stop", [RuntimeError("CUDA error"), KeyboardInterrupt(), SystemExit(143)])
def test_answers_are_kept_whatever_ends_them(answered, tmp_path, monkeypatch, stop):
    """Those that were given out before: all are in the record and in the files."""
    (tmp_path / "kit").symlink_to(answered / "kit")

    def stopped(*args, **options):
        for number, answer in enumerate(write_answers(*args, **options)):
            if number == 11:
                raise stop
            yield answer

    monkeypatch.setattr("bench.recipes.one_gpu.answers.write_answers", stopped)
    with pytest.raises(type(stop)):
        toy(tmp_path, "answers")
    kept, whole = answers_of(tmp_path), answers_of(answered)
    assert len(kept) == 11 == record(tmp_path, "answers")["answers"] and not record(tmp_path, "answers")["finished"]
    assert all(whole[key] == ids for key, ids in kept.items())
    monkeypatch.undo()
    assert toy(tmp_path, "answers") == 0 and answers_of(tmp_path) == whole


def test_setup_warns_of_a_gpu_that_differs(answered, tmp_path, monkeypatch, capsys):
    (tmp_path / "kit").symlink_to(answered / "kit")
    found = {"answers": 8, "losses": [1.0], "deviations": {"loss of stage 1": (1.0, 2.0)}}
    monkeypatch.setattr("bench.recipes.one_gpu.setup.try_every_step", lambda work: found)
    assert toy(tmp_path, "setup", "--kit", "nowhere") == 0
    assert "WARNING: loss of stage 1: 1 on the GPU, 2 on the CPU; within 5%" in capsys.readouterr().err
    assert record(tmp_path, "setup")["deviations"] == {"loss of stage 1": [1.0, 2.0]}


def command_of(out: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The script as a command, and its environment."""
    command = ["bench/recipes/one_gpu.sh", str(out), *arguments, "--toy", "--device", "cpu"]
    return command, os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_part_that_crashes_does_not_stop_the_next(answered, tmp_path):
    """`search` finds a runs.json that is none, `train` what it needs."""
    planned(tmp_path, answered, 3)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "runs.json").write_text("{")
    command, environment = command_of(tmp_path, "evaluate", "search", "train", "--minutes", "4")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "train: done" in done.stdout, done.stdout + done.stderr
    assert record(tmp_path, "train")["finished"]


@pytest.mark.slow
def test_parts_end_with_the_script(answered, tmp_path):
    """Killed at once, the script leaves no part running; ended, the part saves what it has."""
    for number, wait in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "kit").symlink_to(answered / "kit")
        command, environment = command_of(out, "answers", "answers")
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while process.poll() is None and not (out / "answers" / "answers-00.npz").exists():
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == wait
        deadline = time.monotonic() + 20
        while working_in(out) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not working_in(out)
        assert (out / "answers" / "record.json").exists() == (number == signal.SIGTERM)


def working_in(out: Path) -> list[str]:
    """Command lines that name the folder."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if f"bench.recipes.one_gpu {out} " in line]


def planned(out: Path, answered: Path, steps: int) -> None:
    """An OUT with answers and a plan to train by."""
    for name in ("kit", "answers"):
        (out / name).symlink_to(answered / name)
    (out / "train").mkdir()
    (out / "train" / "plan.json").write_text(json.dumps({"settings": BASE, "steps": steps, "save_steps": 3}))


@pytest.mark.slow
def test_training_goes_on_on_another_machine(answered, ticks, tmp_path):
    """Stopped by its time, each time with only OUT/train carried over."""
    whole = before = tmp_path / "whole"
    for number, out in enumerate([whole, *(tmp_path / str(number) for number in range(9))]):
        out.mkdir()
        planned(out, answered, 14)
        if number > 1:
            (out / "train" / "plan.json").unlink()
            (out / "train").rmdir()
            (before / "train").rename(out / "train")
        before = out
        if toy(out, "train", "--minutes", "9" if out == whole else "0.2") == 0 and out != whole:
            break
        assert out == whole or not record(out, "train")["finished"]
    assert number > 2 and record(out, "train")["finished"]
    one, other = (BeagleDraft.from_pretrained(folder / "train" / "draft").state_dict() for folder in (whole, out))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    lines = [json.loads(line)["step"] for line in (out / "train" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 15))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["answers", "train"])
def test_a_killed_part_goes_on(part, answered, tmp_path):
    if part == "train":
        planned(tmp_path, answered, 40)
    else:
        (tmp_path / "kit").symlink_to(answered / "kit")
    command, environment = command_of(tmp_path, part)
    waits = {"answers": "answers/answers-00.npz", "train": "scratch/train/checkpoint-0000003"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (tmp_path / waits[part]).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    assert not (tmp_path / part / "record.json").exists()
    assert toy(tmp_path, part) == 0 and record(tmp_path, part)["finished"]
    if part == "answers":
        assert answers_of(tmp_path) == answers_of(answered)


@pytest.mark.slow
def test_both_heads_train_on_the_same_answers(answered):
    pytest.importorskip("bench.peers.eagle2")
    assert toy(answered, "eagle2") == 0
    runs = json.loads((answered / "eagle2" / "runs.json").read_text())
    assert list(runs) == list(RUNS) and len({row["tokens"] for row in runs.values()}) == 1
    for row in runs.values():
        assert row["steps"] == 4 and [point["step"] for point in row["course"]][-1] == 4
        assert all(row[shape]["tokens_per_round"] >= 1 for shape in SHAPES)
    times = record(answered, "eagle2")["seconds_to_eagle2"]
    assert set(times) == set(RUNS) and any(value is not None for name, value in times.items() if name != "beagle")
    before = (answered / "eagle2" / "runs.json").read_text()
    assert toy(answered, "eagle2") == 0 and (answered / "eagle2" / "runs.json").read_text() == before


def test_a_part_without_its_input_says_which_comes_first(tmp_path, kit, answered, capsys):
    for part, first in (("answers", "setup --kit FOLDER"), ("search", "setup --kit FOLDER"), ("evaluate", "train")):
        assert toy(tmp_path, part) == 2
        assert re.search(
            rf"{part}: .* is not there: run `bench/recipes/one_gpu.sh {tmp_path} {first}` first",
            capsys.readouterr().err,
        )
    assert toy(tmp_path, "setup", "--kit", str(tmp_path / "nowhere")) == 2
    assert "nowhere/kit.json is not there" in capsys.readouterr().err
    (tmp_path / "kit").symlink_to(answered / "kit")
    assert toy(tmp_path, "train") == 2
    assert "answers-00.npz is not there: run" in capsys.readouterr().err
