"""bench.answers.many: three ways to the same texts, in turns; a fault that leaves no figures; the table."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_files import ROWS, write_set
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer

from beagle_sd import Engine
from beagle_sd.decoding.loop import Decoding
from bench.answers import many
from bench.report import calls, results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of all sets, and a tiny pair in place of the bundled one."""
    folder = tmp_path / "sets"
    texts = [f"Say {'again ' * number}." for number in range(4)]
    write_set(folder, "mt-bench", *(ROWS["mt-bench"] | {"turns": [text, "And b?"]} for text in texts))
    for name in ("gsm8k", "humaneval"):
        write_set(folder, name, *(ROWS[name] | {"prompt": text} for text in texts))
    target, tokenizer = agreeable_target(eos_token_id=2, pad_token_id=2), small_tokenizer()
    monkeypatch.setattr(many, "load_bundled", lambda **options: (target, tokenizer, small_draft(target)))
    return folder


def run(folder, out):
    line = f"--count 7 --batch 3 --limits 2 20 --repeats 5 --tree 2,2,4 --folder {folder} --out {out}"
    many.main(line.split())


def test_three_ways_write_the_same_texts_and_become_the_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert calls.many() == "not measured"
    run(folder, tmp_path / "many.json")
    found = json.loads((tmp_path / "many.json").read_text())
    assert (found["count"], found["batch"], found["limits"], found["repeats"]) == (7, 3, [2, 20], 5)
    assert [(row["tree"], row["way"]) for row in found["rows"]] == [(t, w) for t in (None, "2,2,4") for w in many.WAYS]
    for row in found["rows"]:
        assert (row["texts"], row["equal"], row["ties"], row["faults"]) == (7, 7, 0, 0)
        assert row["tokens"] == found["rows"][0]["tokens"] > 7
    for own, waits, on in (found["rows"][:3], found["rows"][3:]):
        assert own["ratio"] is None and own["rounds"] <= waits["rounds"] == on["rounds"]
        assert waits["ratio"]["low"] <= waits["ratio"]["median"] <= waits["ratio"]["high"] and waits["ratio"]["bound"]
    lines = calls.many().splitlines()
    assert lines[2].startswith("| no draft | `generate_many` | 7 of 7 |") and lines[2].endswith("|  |  |")
    assert lines[7].startswith("| 2,2,4 | `generate` waits, ended rows computed on | 7 of 7 |")


def test_limits_are_each_row_s_own_and_ended_rows_are_computed_on_in_one_way_alone(folder, monkeypatch):
    target, tokenizer, _ = many.load_bundled()
    requests = many.mixed_requests(tokenizer, 6, 2, 20, 0, folder)
    again = many.mixed_requests(tokenizer, 6, 2, 20, 0, folder)
    assert [(one.ids, one.max_new_tokens) for one in requests] == [(one.ids, one.max_new_tokens) for one in again]
    assert len({one.max_new_tokens for one in requests}) > 1 and len({len(one.ids) for one in requests}) > 1
    engine, packed, widths = Engine(target, None, batch=3, capacity=300), Decoding._pack, []
    monkeypatch.setattr(engine, "play", _noting(engine.play, widths))
    for on in (False, True):
        widths.clear()
        made = many.waits(engine, requests, on=on)
        assert all(len(row) <= one.max_new_tokens for row, one in zip(made.tokens, requests, strict=True))
        assert any(len(row) == one.max_new_tokens for row, one in zip(made.tokens, requests, strict=True))
        assert made.rounds == len(widths) and (set(widths) == {3}) == on
    assert Decoding._pack is packed
    assert many.OwnLimits(4, [2, 3])(torch.zeros(2, 6), None).tolist() == [True, False]


def _noting(play, widths):
    def noted(shape, clock, width=None):
        widths.append(width)
        return play(shape, clock, width)

    return noted


def test_a_text_that_differs_leaves_no_figures(folder, tmp_path, monkeypatch):
    def wrong(engine, requests):
        made = many.waits(engine, requests)
        made.tokens[-1][0] = (made.tokens[-1][0] + 1) % 90
        return made

    monkeypatch.setitem(many.WAYS, many.WAITS, wrong)
    with pytest.raises(SystemExit, match="texts of one prompt differ"):
        run(folder, tmp_path / "many.json")
    assert not (tmp_path / "many.json").exists()


def test_ratios_are_of_one_turn_by_seconds_a_token():
    requests = [many.Request([1, 2], key=0)]
    found = {
        many.REFILLED: [many.Pass([[3, 4]], 1, seconds) for seconds in (2.0, 4.0)],
        many.WAITS: [many.Pass([[3, 4]], 2, seconds) for seconds in (3.0, 12.0)],
    }
    own, waits = many.rows_of(None, requests, found)
    assert (own["rounds"], own["tokens_per_second"], waits["rounds"]) == (1, round(1 / 1.5, 2), 2)
    assert waits["ratio"]["median"] == 2.25
