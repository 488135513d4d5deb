from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from beagle_sd.data.conversations import stored_answers
from beagle_sd.data.evaluation_sets import EVALUATION_SETS, evaluation_ngrams, ngrams
from beagle_sd.data.prompts import sources, templates
from beagle_sd.data.prompts.build import MIX, barred_ngrams, build_prompts
from beagle_sd.models import smollm2

TEMPLATES = {"templates": 1.0}
STORED = Path(__file__).resolve().parents[3] / "bench" / "data"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def contents(rows):
    return [row["messages"][0]["content"] for row in rows]


def slots(text):
    return set(re.findall(r"\{([a-z_]+)\d?\}", text))


def test_same_seed_same_prompts(empty_cache):
    first, again, other = (build_prompts(300, seed, TEMPLATES, empty_cache) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len(set(contents(first)) & set(contents(other))) < 60


def test_shape_count_and_distinctness(empty_cache):
    rows = build_prompts(2000, 0, TEMPLATES, empty_cache)
    texts = contents(rows)
    assert len(texts) == len(set(texts)) == 2000
    for row in rows:
        assert row["source"] == "templates"
        assert [message["role"] for message in row["messages"]] == ["user"]
    for text in texts:
        assert text.strip() and "a(n)" not in text.lower()
        assert not slots(text) and "{int" not in text and not text.startswith("Def ")
        assert len(text.split()) <= 200
    assert build_prompts(0, 0, TEMPLATES, empty_cache) == []


def test_every_slot_and_list_is_known_and_used():
    data, topics = templates.text_file("templates.json"), templates.text_file("topics.json")
    every = [t for group in data["groups"].values() for t in group["templates"]]
    assert len(every) == len(set(every)) + 2  # the plain question stands there three times, for its weight
    asked = set().union(*(slots(t) for t in every + data["closers"] + sum(topics.values(), [])))
    functions = set(templates.function_slots(templates.text_file("functions.json")[0]))
    assert asked <= set(topics) | functions
    assert set(topics) <= asked
    for name, entries in topics.items():
        assert len(entries) == len(set(entries)), name


def test_every_template_fills():
    groups = templates.text_file("templates.json")["groups"]
    for template in (t for group in groups.values() for t in group["templates"]):
        text = templates.Filler(random.Random(template))(template)
        assert not slots(text), template


def test_slots_repeat_and_differ():
    filler = templates.Filler(random.Random(0))
    first, same, other = filler("{name}|{name}|{name2}").split("|")
    assert first == same != other
    assert 3 <= int(filler("{int 3 5}")) <= 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a(n) octopus", "an octopus"),
        ("A(n) kite", "A kite"),
        ("a(n) university", "a university"),
        ("a(n) umbrella", "an umbrella"),
    ],
)
def test_article(text, expected):
    assert templates.article(text) == expected


def test_function_tasks_are_python():
    for task in templates.text_file("functions.json"):
        name = task["signature"].split("(")[0]
        assert re.search(rf"\b{name}\(", task["example"]) and " == " in task["example"], name
        compile(templates.function_slots(task)["pyfunc_stub"], name, "exec")
        compile(task["example"], name, "eval")


def test_bad_arguments_are_refused(tmp_path):
    for count, mix in [(-1, None), (5, {"sharegpt": 1.0}), (5, {}), (5, {"templates": 0.0}), (5, {"templates": -1.0})]:
        with pytest.raises(ValueError, match="templates"):
            build_prompts(count, 0, mix, tmp_path)


def test_missing_sources_are_all_named(empty_cache):
    with pytest.raises(FileNotFoundError) as error:
        build_prompts(10, 0, {"templates": 1, "reasoning-gym": 1, "chitchat-dataset": 1}, empty_cache)
    for part in ("reasoning-gym==", "chitchat-dataset==", "leave them out of mix"):
        assert part in str(error.value)


def test_prompts_of_the_evaluation_sets_are_dropped(empty_cache):
    before = contents(build_prompts(400, 1, TEMPLATES, empty_cache))
    stolen = next(text for text in before if len(text.split()) >= 12)
    path = empty_cache / EVALUATION_SETS["mt-bench"].member
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question_id": 1, "category": "x", "turns": ["Unrelated.", f"Yes. {stolen.upper()}"]}))
    after = contents(build_prompts(400, 1, TEMPLATES, empty_cache))
    assert stolen in before and stolen not in after
    assert len(after) == 400
    assert not any(ngrams(text) & ngrams(stolen) for text in after)


def test_texts_to_edit_are_barred_without_a_file(empty_cache):
    assert barred_ngrams(empty_cache) == evaluation_ngrams(["editing"])


def test_default_build_shares_nothing_with_the_evaluation_sets():
    try:
        barred = evaluation_ngrams(download=False)
        rows = build_prompts(1500, 0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert not any(ngrams(text) & barred for text in contents(rows))
    counts = Counter(row["source"] for row in rows)
    assert {name: counts[name] for name in MIX} == {name: round(1500 * share) for name, share in MIX.items()}


@pytest.mark.parametrize("name", sorted(MIX))
def test_each_source_is_deterministic_and_readable(name):
    try:
        rows, again = (build_prompts(40, 2, {name: 1.0}) for _ in range(2))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert rows == again
    assert len(rows) == 40
    for text in contents(rows):
        assert 3 <= len(text.split()) <= 150
        assert "http" not in text or name != "chitchat-dataset"


def test_imported_puzzles_leave_no_module_behind():
    before = {name for name in sys.modules if name.startswith("reasoning_gym")}
    try:
        build_prompts(20, 0, {"reasoning-gym": 1.0})
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert {name for name in sys.modules if name.startswith("reasoning_gym")} == before


@pytest.mark.parametrize(
    ("text", "sensible"),
    [
        ("I really like old films a lot", True),
        ("hey there", False),
        ("IS ANYBODY THERE AT ALL TODAY", False),
        ("look at http://x.org it is nice", False),
        ("you are a real bitch you know", False),
    ],
)
def test_first_lines_that_stand_alone(text, sensible):
    assert sources._sensible(text) is sensible


@pytest.mark.slow
def test_what_drafts_are_trained_on_shares_nothing_with_the_evaluation_sets():
    """The prompts of the stored answers, as text again, and new ones of the sources that need no file.

    Fourteen stored prompts count from 1 to 8, or 1 to 4 twice, as examples in HumanEval do: no word is shared.
    """
    try:
        barred = evaluation_ngrams()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(barred) > 10_000
    tokenizer = AutoTokenizer.from_pretrained(smollm2.converted())
    for name, least, counting in (("answers", 25_000, 14), ("long-answers", 300, 0), ("own-answers", 5_000, 0)):
        stored = stored_answers(STORED / f"smollm2-135m-{name}.npz")
        bounds = stored["lengths"].cumsum()[:-1]
        parts = zip(np.split(stored["ids"], bounds), np.split(stored["learn"], bounds), strict=True)
        texts = tokenizer.batch_decode([ids[~learn].tolist() for ids, learn in parts])
        assert len(texts) > least and texts[0].startswith("<|im_start|>") and "user" in texts[0]
        shared = [ngrams(text) & barred for text in texts]
        assert all(word.isdigit() for found in shared for gram in found for word in gram), name
        assert sum(map(bool, shared)) <= counting
    new = contents(build_prompts(2000, 11, {"templates": 0.9, "python-stdlib": 0.1}))
    assert not [text for text in new if ngrams(text) & barred]
    planted = f"so: {' '.join(min(barred))}, then"
    assert ngrams(planted) & barred, "the check finds what it looks for"
