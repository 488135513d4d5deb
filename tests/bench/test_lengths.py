"""Acceptance by length of the text: the prompts have their lengths, and a draft's window is measured beside none."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_files import write_set
from models import small_draft, small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd import generate
from beagle_sd.data.evaluation_sets import EVALUATION_TEXTS, evaluation_text, ngrams
from beagle_sd.data.prompts import build
from bench.answers import acceptance, lengths, long_texts
from bench.report import plots, results, tables

LENGTHS = [120, 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every long text and of MT-Bench, where the cache would have them."""
    folder = tmp_path_factory.mktemp("texts")
    for chosen in (one for kind in EVALUATION_TEXTS.values() for one in kind):
        for member in chosen.members:
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            head = "Name: x\n\n" if member.endswith("METADATA") else ""
            (folder / member).write_text(head + f"{member} tells of boats. " * 20, encoding="utf-8")
    asked = [["Say a.", "Say it again."], *[[f"Say {n}.", "And b?"] for n in range(9)]]
    write_set(folder, "mt-bench", *({"question_id": 7, "category": "writing", "turns": turns} for turns in asked))
    return folder


@pytest.mark.parametrize("kind", long_texts.KINDS)
def test_prompts_have_about_their_lengths(folder, kind):
    tokenizer = small_tokenizer()
    target = small_target(max_position_embeddings=600)
    found = long_texts.prompts_of(kind, target, tokenizer, LENGTHS, 1, folder)
    for length in LENGTHS:
        ((*ids,),) = found[length]
        assert max(20, length - 200 * (kind == "chats")) <= len(ids) <= length
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    short, long = (found[length][0] for length in LENGTHS)
    assert len(long) > len(short)
    assert kind == "chats" or short[: len(short) // 3] == long[: len(short) // 3]


def test_a_chat_s_last_question_is_the_same_at_each_length(folder):
    tokenizer, target = small_tokenizer(), small_target(max_position_embeddings=1000)
    found = long_texts.prompts_of("chats", target, tokenizer, [40, 120, 400, 700], 1, folder)
    alone, _, short, long = (tokenizer.decode(ids) for ((*ids,),) in found.values())
    turn, asked = "<|im_start|>user\n", "<|im_start|>user\nSay a.<|im_end|>\n<|im_start|>assistant\n"
    assert alone == asked and found[40] == found[120] and short.endswith(asked) and long.endswith(asked)
    assert "Say it again." not in long and "Say 0." in short
    assert 2 < short.count(turn) < long.count(turn) and long.startswith(short.removesuffix(asked))


def test_texts_are_whole_and_barred_from_training(folder, monkeypatch, tmp_path):
    assert all(len(kind) == 6 for kind in EVALUATION_TEXTS.values())
    readme = next(one for one in EVALUATION_TEXTS["documents"] if "METADATA" in one.members[0])
    text = evaluation_text(readme, folder, download=False)
    assert text.startswith(readme.members[0]) and "Name:" not in text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    barred = build.barred_ngrams(folder)
    codes = [ngrams(evaluation_text(one, folder, download=False)) for one in EVALUATION_TEXTS["code"]]
    assert ngrams(text) and ngrams(text) <= barred and all(found and found <= barred for found in codes)
    gone = build.barred_ngrams(tmp_path / "nowhere")
    assert gone and not gone & ngrams(text), "the set that needs no file is barred always"
    (tmp_path / "one" / readme.members[0]).parent.mkdir(parents=True)
    (tmp_path / "one" / readme.members[0]).write_bytes((folder / readme.members[0]).read_bytes())
    assert build.barred_ngrams(tmp_path / "one") == ngrams(text) | gone, "one is barred where others are missing"
    with pytest.raises(ValueError, match="kind is 'songs'; allowed: documents"):
        long_texts.prompts_of("songs", None, None, [1], 1)


def test_a_window_is_measured_beside_none(folder, tmp_path, monkeypatch):
    target = small_target(max_position_embeddings=600)
    draft = small_draft(target)
    monkeypatch.setattr(lengths, "load_target", lambda *args, **options: (target, small_tokenizer()))
    monkeypatch.setattr(lengths, "load_draft", lambda *args: draft)
    out, line = tmp_path / "cpu-lengths.json", "--draft d --kinds code --count 1 --window-keys 0 8 --max-new-tokens 8"
    more = "--lengths 120 300 --tree 2,2,4 --temperatures 0 1"
    lengths.main([*line.split(), *more.split(), "--folder", str(folder), "--out", str(out)])
    measured = json.loads(out.read_text())
    assert draft.config.window_keys is None and (measured["draft"], measured["tree"]) == ("d", "2,2,4")
    where = [(row["length"], row["window_keys"], row["temperature"]) for row in measured["rows"]]
    assert where == [(length, window, T) for length in LENGTHS for window in (None, 8) for T in (0.0, 1.0)]
    for row in measured["rows"]:
        assert row["kind"] == "code" and 1 <= row["tokens_per_round"] <= 3 and len(row["acceptance_by_depth"]) <= 2
        assert row["row_rounds"] > 0 and 0 < row["draft_ms"] < row["round_ms"] > row["target_ms"] > 0
        assert abs(row["tokens"] - row["length"]) < 4 and 0 < row["certainty"] <= 1
        assert row["standard_error"] is None, "of one text"
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    _resumed([*line.split(), *more.split(), "--folder", str(folder), "--out", str(out)], out, measured)
    shown = tables.lengths().splitlines()
    assert len(shown) == 10 and "| code | 1" in shown[2] and "| all | 0 |" in shown[2] and "| 8 | 1 |" in shown[-1]
    (plot,) = plots.draw_lengths(measured["rows"], tmp_path)
    assert plot.name == "cpu-lengths.svg" and "window 8, T = 1" in plot.read_text()


def _resumed(line, out, measured):
    """What is measured is kept, what is missing is measured, and other settings are refused."""
    out.write_text(json.dumps(measured | {"rows": measured["rows"][2:]}))
    lengths.main([*line, "--resume"])
    rows = json.loads(out.read_text())["rows"]
    assert rows[2:] == measured["rows"][2:] and len(rows) == len(measured["rows"])
    assert [row["tokens_per_round"] for row in rows[:2]] == [row["tokens_per_round"] for row in measured["rows"][:2]]
    with pytest.raises(ValueError, match=r"measured with \{'seed': 0\}, not \{'seed': 1\}; allowed: the same"):
        lengths.main([*line, "--resume", "--seed", "1"])
    out.write_text(json.dumps(measured))


def test_a_standard_error_is_that_of_a_ratio_over_texts():
    assert acceptance.standard_error([10, 12, 20], [5, 6, 10]) == 0.0
    # of equal rounds it is that of a mean: the deviations are -1, 0 and 1
    assert acceptance.standard_error([10, 20, 30], [10, 10, 10]) == pytest.approx((1 / 3) ** 0.5, abs=1e-4)
    assert acceptance.standard_error([10], [5]) is None


def test_the_certainty_is_the_probability_of_what_was_chosen():
    target = small_target(max_position_embeddings=600)
    draft, ids = small_draft(target), list(range(5, 40))
    made = generate(target, draft, torch.tensor([ids]), max_new_tokens=12, eos_token_id=[])
    found = lengths._chances(draft.target, made.sequences[0], len(ids))
    logits = target(made.sequences).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(found, logits.softmax(-1).amax(-1))


def test_nothing_measured_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert tables.lengths() == "not measured" and plots.draw_lengths([], tmp_path) == []
