from __future__ import annotations

import json

import pytest
import torch
from chat_templates import CHATML, MISTRAL, Template
from models import small_target
from tokenizers_for_tests import chat_tokenizer, small_tokenizer

from beagle_sd.data.chats import encode_chat
from beagle_sd.data.evaluation_sets import EVALUATION_SETS, ngrams, prompts_folder
from beagle_sd.data.prompts import written
from beagle_sd.data.prompts.written import written_prompts

SIZES = {"batch": 16, "max_new_tokens": 200}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pair():
    return small_target(), small_tokenizer()


def contents(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_as_many_as_asked_for_each_once_and_ended_by_the_target(pair):
    rows = written_prompts(*pair, 30, seed=1, **SIZES)
    texts = contents(rows)
    assert len(texts) == len(set(texts)) == 30
    for row, text in zip(rows, texts):
        assert row["source"] == "target" and [message["role"] for message in row["messages"]] == ["user"]
        assert text and text == text.strip() and "<|im" not in text and len(text) < 220
        encode_chat(pair[1], row["messages"])


def test_half_begin_with_an_opening(pair):
    texts = contents(written_prompts(*pair, 60, seed=2, **SIZES))
    opened = sum(text.startswith(tuple(word for word in written._OPENINGS if len(word) > 2)) for text in texts)
    assert 15 <= opened <= 45


def test_the_same_seed_gives_the_same(pair):
    first, again, other = (contents(written_prompts(*pair, 12, seed=seed, **SIZES)) for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


def test_prompts_of_the_evaluation_sets_are_dropped(pair, monkeypatch):
    monkeypatch.setattr(written, "_OPENINGS", ["one two three four five six seven eight nine"])
    texts = contents(written_prompts(*pair, 20, seed=5, **SIZES))
    stolen = next(text for text in texts if ngrams(text))
    path = prompts_folder() / EVALUATION_SETS["mt-bench"].member
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question_id": 1, "category": "x", "turns": [stolen, "Unrelated."]}))
    clean = contents(written_prompts(*pair, 20, seed=5, **SIZES))
    assert len(clean) == 20 and not any(ngrams(text) & ngrams(stolen) for text in clean)


def test_a_target_that_ends_no_turn_is_refused(pair):
    target = small_target()
    target.lm_head.weight.data[2] = 0.0  # the end of a turn; every other logit may be positive
    with pytest.raises(ValueError, match="of [0-9]+ prompts that the target began none was of use; allowed"):
        written_prompts(target, pair[1], 2, batch=64, max_new_tokens=1)


def test_few_of_use_are_returned_as_they_are(pair, monkeypatch):
    monkeypatch.setattr(written, "_ROUNDS", 1)
    rows = written_prompts(*pair, 40, batch=64, max_new_tokens=9)
    assert 0 < len(rows) < 40


def test_the_first_word_is_kept_where_it_takes_the_blank_before_it():
    """A word and the blanks before it are one token here: the template's last blank goes with the word."""
    turn = written._UserTurn(chat_tokenizer(MISTRAL, words=True))
    assert turn.before.endswith("[INST] ") and len(turn.ids) == 2
    requests = [turn.request(0, index) for index in range(40)]
    opened = [request.ids for request in requests if request.ids != turn.ids]
    assert 5 < len(opened) < 35 and {tuple(ids[:-1]) for ids in opened} == {tuple(turn.ids)}
    assert {turn.text(torch.tensor(ids)) for ids in opened} == {"?"}, "a word that this vocabulary does not know"


def test_no_first_word_where_it_would_change_the_template_s_tokens():
    """The new line before the user's text is one token with a first word, which the model never saw there."""
    turn = written._UserTurn(chat_tokenizer(CHATML, words=True))
    assert all(turn.request(0, index).ids == turn.ids for index in range(40))


@pytest.mark.parametrize("count", [0, -3])
def test_none_and_fewer(count, pair):
    if count == 0:
        assert written_prompts(*pair, 0) == []
        return
    with pytest.raises(ValueError, match="count is -3; allowed: 0 or more"):
        written_prompts(*pair, count)


def test_a_template_without_an_end_of_its_own_is_refused():
    shape = Template("", (), "{% for m in messages %}USER: {{ m.content }} {% endfor %}")
    with pytest.raises(ValueError, match="ends a user's turn with no token of its own"):
        written_prompts(small_target(), chat_tokenizer(shape), 3, **SIZES)


@pytest.mark.parametrize("name", ["batch", "max_new_tokens"])
def test_sizes_below_one_are_refused(name, pair):
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: at least 1"):
        written_prompts(*pair, 3, **SIZES | {name: 0})
