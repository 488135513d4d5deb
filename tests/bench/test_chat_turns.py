"""bench.answers.chat_turns: chats of given lengths, what each way prefills, faults that leave no figures, a table."""

from __future__ import annotations

import json

import pytest
from evaluation_files import ROWS, write_set
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer

from bench.answers import chat_turns
from bench.report import calls, results

LENGTHS = [10, 20, 40]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of all sets with questions of 6 to 49 characters, and a tiny pair in place of the bundled one."""
    folder = tmp_path / "sets"
    for place, name in enumerate(chat_turns.SETS):
        asked = [f"{'a' * length}?" for length in range(5 + place, 49, 3)]
        write_set(folder, name, *(ROWS[name] | {"prompt": text, "turns": [text]} for text in asked))
    target, tokenizer = agreeable_target(eos_token_id=2), small_tokenizer()
    monkeypatch.setattr(chat_turns, "load_bundled", lambda **options: (target, tokenizer, small_draft(target)))
    return folder


def run(folder, out):
    line = f"--count 3 --lengths 10 20 40 --max-new-tokens 9 --repeats 2 --tree 2,2,4 --folder {folder} --out {out}"
    chat_turns.main(line.split())


def test_each_length_stands_at_each_place_and_no_question_twice(folder):
    tokenizer = small_tokenizer()
    found = chat_turns.chats(tokenizer, LENGTHS, 3, folder)
    assert [[length for length, _ in chat] for chat in found] == [[10, 20, 40], [20, 40, 10], [40, 10, 20]]
    asked = [tokenizer.decode(part).partition("user\n")[2].partition("?")[0] for chat in found for _, part in chat]
    lengths = [length for chat in found for length, _ in chat]
    assert len(set(asked)) == 9
    assert all(abs(len(text) + 1 - length) <= 1 for text, length in zip(asked, lengths, strict=True))
    assert all(tokenizer.decode(part).startswith("<|im_end|>") for chat in found for _, part in chat[1:])


def test_later_turns_are_measured_three_ways_and_become_the_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert calls.chat_turns() == "not measured"
    run(folder, tmp_path / "chat-turns.json")
    found = json.loads((tmp_path / "chat-turns.json").read_text())
    assert (found["count"], found["repeats"], found["answers"], found["ties"]) == (3, 2, 12, 0)
    assert [(row["length"], row["turns"]) for row in found["rows"]] == [(10, 2), (20, 2), (40, 2), (None, 6)]
    for row in found["rows"]:
        assert row["held"] > 30 and 1 <= row["new"] < 100
        assert min(row["reused_ms"], row["whole_ms"], row["alone_ms"]) > 0 and row["over_alone"]["median"] > 0
        assert row["saved"]["median"] < 1
    short, *_, of_all = found["rows"]
    assert short["over_alone"]["at_most"] is None and of_all["over_alone"]["at_most"] >= of_all["over_alone"]["median"]
    lines = calls.chat_turns().splitlines()
    assert lines[2].startswith("| 10 tokens | 2 |") and lines[-1].startswith("| all | 6 |")


def test_ratios_are_medians_of_repeats_and_the_bound_is_from_above():
    turns = []
    for over in (1.0, 1.1, 1.2, 1.3, 1.4):
        ms = {"reused": [over, 4.0 * over, over], "whole": [4.0, 1.0, 4.0], "alone": [1.0, 1.0, 1.0]}
        turns.append(chat_turns.Turn(50, 7, 3, ms))
    row = chat_turns.row_of(50, turns)
    assert row["over_alone"]["median"] == 1.2 and row["over_alone"]["at_most"] == 1.4
    assert row["saved"]["median"] == 0.7 and (row["held"], row["new"], row["turns"]) == (7, 3, 5)


def test_another_answer_with_reuse_leaves_no_figures(folder, tmp_path, monkeypatch):
    real = chat_turns.generate

    def wrong(target, draft, ids, *, engine, **options):
        held = engine.common(engine.held([0])[0], ids[0].tolist())
        made = real(target, draft, ids, engine=engine, **options)
        if held > 20:
            made.sequences[0, ids.shape[1] + 1] = (made.sequences[0, ids.shape[1] + 1] + 1) % 90
        return made

    monkeypatch.setattr(chat_turns, "generate", wrong)
    with pytest.raises(SystemExit, match="differs from a fresh engine's"):
        run(folder, tmp_path / "chat-turns.json")
    assert not (tmp_path / "chat-turns.json").exists()


def test_prefills_of_other_sizes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_turns.Engine, "forget", lambda self: None)
    with pytest.raises(SystemExit, match="tokens were prefilled"):
        run(folder, tmp_path / "chat-turns.json")
