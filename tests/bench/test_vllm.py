"""bench.answers.vllm without vLLM: turns, rows, and the table they become."""

from __future__ import annotations

import json

import pytest

from bench.answers import vllm
from bench.answers.vllm import Written
from bench.report import results, tables


def contender(texts, rounds=0, accepted=()):
    return lambda prompts: Written([texts[prompt[0]] for prompt in prompts], rounds, list(accepted))


def test_contenders_take_turns_and_rows_compare_them_with_plain_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "_PAUSE", 0)
    blocks = [[[0], [1]], [[2]]]
    texts = {0: [5, 6, 7], 1: [5], 2: [8, 9]}
    made = {
        vllm.PLAIN: contender(texts, 3),
        "same": contender(texts, 2, [1, 0]),
        "other": contender(texts | {1: [6]}, 2, [3, 1]),
    }
    found = vllm.in_turns(made, blocks, repeats=2)
    assert [len(calls) for calls in found.values()] == [4, 4, 4]
    plain, same, other = vllm.rows_of(found, len(blocks))
    assert (plain["texts"], plain["texts_equal"], plain["tokens"], plain["rounds"]) == (3, 3, 6, 6)
    assert plain["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0} and plain["accepted_by_depth"] == []
    assert same["accepted_by_depth"] == [2, 0] and same["tokens_per_round"] == 0.75
    assert same["ratio"]["low"] <= same["ratio"]["median"] <= same["ratio"]["high"]
    assert other["texts_equal"] == 2 and other["ratio"] is None and other["tokens_per_second"] is None


@pytest.mark.parametrize("ends, text", [(None, [4, 2, 3, 2]), (2, [4, 2]), ([9, 3], [4, 2, 3])])
def test_texts_end_with_their_end_token(ends, text):
    assert vllm.until_end([4, 2, 3, 2], ends) == text


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert tables.inside_vllm() == "not measured"
    row = {
        "contender": "vLLM, beagle k = 2", "texts": 12, "texts_equal": 11, "tokens": 1378, "rounds": 800,
        "accepted_by_depth": [350, 180], "tokens_per_round": 1.6625, "tokens_per_second": 91.27,
        "ratio": {"low": 0.7, "median": 0.8, "high": 0.9},
    }  # fmt: skip
    (tmp_path / "cpu-vllm.json").write_text(json.dumps({"rows": [row]}))
    wanted = "| vLLM, beagle k = 2 | 11 of 12 | 1,378 | 800 | 350 180 | 1.663 | 91.3 | 0.80 (0.70, 0.90) |"
    assert tables.inside_vllm().splitlines()[-1] in (wanted, wanted.replace("1.663", "1.662"))
