from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models import small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd.data import shards
from beagle_sd.data.chats import encode_chat, encode_conversation
from beagle_sd.data.conversations import (
    HUMAN,
    export_answers,
    read_conversations,
    read_prompts,
    stored_answers,
    write_answer_file,
)
from beagle_sd.data.rows import LeftOut
from beagle_sd.data.states import sequences_with_states

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_loss_falls_on_what_the_assistant_says_and_its_end():
    tokenizer = small_tokenizer()
    ids, learn = encode_conversation(tokenizer, TURNS)
    learned = tokenizer.decode([token for token, on in zip(ids, learn) if on], skip_special_tokens=False)
    assert learned.replace(" ", "") == "hello.<|im_end|>4<|im_end|>"
    assert not any(learn[: ids.index(tokenizer.convert_tokens_to_ids("."))][:10])


def test_jsonl_in_both_forms(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello."}]}
    path = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS[:2]}, sharegpt)
    first, second = read_conversations(path, small_tokenizer(), 2048)
    assert first.ids == second.ids and first.learn == second.learn and (first.index, second.index) == (0, 1)
    assert first.temperature == HUMAN
    cut = next(read_conversations(path, small_tokenizer(), 30))
    assert cut.ids == first.ids[:30] and cut.learn == first.learn[:30] and any(cut.learn)


def test_what_ends_an_answer_ends_what_is_learnt(tmp_path):
    path, tokenizer = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS}), small_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(character) for character in "o4"]
    (one,) = read_conversations(path, tokenizer, 2048, ends=ends)
    assert tokenizer.decode([token for token, on in zip(one.ids, one.learn) if on]) == "hello4"


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path):
    rows = [
        {"messages": TURNS},
        {"messages": TURNS[:1]},
        {"messages": [{"role": "user", "content": "word " * 30}, TURNS[1]]},
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
        {"messages": [TURNS[0], {"role": "tool", "content": "x"}, TURNS[1]]},
        {"messages": TURNS[:1]},
    ]
    path, left = write_lines(tmp_path / "chats.jsonl", *rows), LeftOut()
    assert [one.index for one in read_conversations(path, small_tokenizer(), 100, left=left)] == [0]
    assert left.count == 5 and left.lines()[0].startswith("left out 2: no assistant turn to learn from")
    told = "\n".join(left.lines())
    assert all(f"(first: {path}: line {line})" in told for line in (2, 3, 4, 5))
    assert all(reason in told for reason in ("too long: no answer within 100", "nothing to learn", "role 'tool'"))
    with pytest.warns(UserWarning, match="left out 2: no assistant turn.*; left out 1: too long"):
        assert len(list(read_conversations(path, small_tokenizer(), 100))) == 1
    with pytest.raises(ValueError, match=r"chats\.jsonl: line 2: no assistant turn.*--regenerate"):
        list(read_conversations(path, small_tokenizer(), 100, left=LeftOut(strict=True)))


def test_a_template_that_refuses_a_row_is_quoted(tmp_path):
    tokenizer, left = small_tokenizer(), LeftOut()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS}, {"messages": TURNS, "system": "s"})
    assert [one.index for one in read_conversations(path, tokenizer, 999, left=left)] == [0]
    (line,) = left.lines()
    assert "refuses it: System role not supported" in line and "chats.jsonl: line 2" in line


def test_prompts_end_with_the_last_user_turn(tmp_path):
    rows = [{"messages": turns} for turns in (TURNS, TURNS[1:2], [{"role": "user", "content": "a" * 99}], TURNS[:1])]
    path, tokenizer, left = write_lines(tmp_path / "chats.jsonl", *rows), small_tokenizer(), LeftOut()
    found = dict(read_prompts(path, tokenizer, 80, left))
    assert found == {0: encode_chat(tokenizer, TURNS[:3]), 3: encode_chat(tokenizer, TURNS[:1])}
    assert sorted(left.reasons) == ["no user turn to answer", "too long: a prompt of more than 80 tokens"]
    exact = len(found[0])
    assert 0 in dict(read_prompts(path, tokenizer, exact, LeftOut()))
    assert 0 not in dict(read_prompts(path, tokenizer, exact - 1, LeftOut()))


def test_a_row_of_user_turns_alone_is_a_chat_to_be_answered(tmp_path):
    system, *asked = [{"role": "user", "content": text} for text in ("be kind", "ab", "c", "d")]
    system["role"] = "system"
    rows = [{"messages": [system, *asked]}, {"messages": [asked[0], TURNS[1], asked[1]]}]
    path, tokenizer, left = write_lines(tmp_path / "chats.jsonl", *rows), small_tokenizer(), LeftOut()
    (index, first, *later), (other, *single) = read_prompts(path, tokenizer, 80, left)
    assert (index, other) == (0, 1) and len(later) == 2 and len(single) == 1
    answered = [system, asked[0], {"role": "assistant", "content": "x"}, asked[1]]
    written = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert first + written + later[0] == encode_chat(tokenizer, answered)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{{ messages | length }}{{ message['content'] }}"
    )
    assert list(read_prompts(path, tokenizer, 80, left))[0][0] == 1
    assert left.lines()[0].startswith("left out 1: the chat template changes earlier turns")


def test_plain_text_is_learned_whole(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 10, encoding="utf-8")
    parts = list(read_conversations(path, small_tokenizer(), 16))
    assert [len(part.ids) for part in parts] == [16, 16, 8] and all(all(part.learn) for part in parts)
    path.write_bytes(b"\xef\xbb\xbf" + b"abc " * 4 + b"d")
    (part,) = read_conversations(path, small_tokenizer(), 16)
    assert part.ids == parts[0].ids, "no byte order mark, and no lonely last token"


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="allowed"):
        list(read_conversations(tmp_path / "none.jsonl", small_tokenizer(), 8))
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(ValueError, match=r"'.csv'; allowed"):
        list(read_conversations(tmp_path / "x.csv", small_tokenizer(), 8))
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(ValueError, match="not a whole answers file"):
        list(read_conversations(tmp_path / "x.npz", small_tokenizer(), 8))


def test_states_are_those_of_each_conversation_alone(tmp_path):
    model, tokenizer = small_target(), small_tokenizer()
    path = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS}, {"messages": TURNS[:2]})
    items = list(read_conversations(path, tokenizer, 2048))
    found = {sequence.index: sequence for sequence in sequences_with_states(model, items)}
    assert list(found) == [0, 1], "the longer one first"
    for item in items:
        sequence = found[item.index]
        with torch.no_grad():
            alone = model.model(torch.tensor([item.ids])).last_hidden_state[0, :-1]
        torch.testing.assert_close(sequence.states.float(), alone, rtol=1e-2, atol=1e-2)
        assert sequence.tokens.tolist() == item.ids[:-1] and sequence.final_token == item.ids[-1]
        assert sequence.loss_mask.tolist() == item.learn[1:]


def test_stored_answers_read_back(tmp_path):
    writer = shards.ShardWriter(tmp_path / "states", {"target": "t"})
    tokens = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
    for index, part in ((3, tokens[0]), (1, tokens[1])):
        mask = torch.arange(len(part)) >= 1
        writer.add(shards.Sequence(part, mask, torch.zeros(len(part), 4, dtype=torch.bfloat16), 2, index, 0.7))
    writer.flush()
    assert export_answers(tmp_path / "states", tmp_path / "answers.npz", {1: "a", 3: "b"}) == 2
    assert set(stored_answers(tmp_path / "answers.npz")) == {"ids", "learn", "lengths", "temperature", "index"}
    first, second = read_conversations(tmp_path / "answers.npz", small_tokenizer(), 2048)
    assert (first.index, first.ids, first.learn) == (1, [9, 10, 2], [False, False, True])
    assert (second.index, second.ids, second.learn) == (3, [5, 6, 7, 8, 2], [False, False, True, True, True])
    assert second.temperature == pytest.approx(0.7)
    left = LeftOut()
    assert [one.index for one in read_conversations(tmp_path / "answers.npz", small_tokenizer(), 2, left=left)] == []
    assert left.count == 2
    with np.load(tmp_path / "answers.npz") as data:
        parts = dict(data)
    np.savez(tmp_path / "old.npz", **parts | {"learn": [[9]]})
    with pytest.raises(ValueError, match="do not belong together"):
        stored_answers(tmp_path / "old.npz")
    del parts["learn"]
    np.savez(tmp_path / "old.npz", **parts, prompt_lengths=np.array([2, 2]))
    assert list(read_conversations(tmp_path / "old.npz", small_tokenizer(), 2048)) == [first, second]


def test_every_answer_of_a_chat_is_learnt_from_a_file(tmp_path):
    mask = torch.tensor([False, True, True, False, False, True])
    one = shards.Sequence(torch.arange(6), mask, torch.empty(0), 9, 4, 0.0)
    write_answer_file(tmp_path / "answers.npz", [one], {})
    (found,) = read_conversations(tmp_path / "answers.npz", small_tokenizer(), 2048)
    assert found.learn == [False, *mask.tolist()] and found.ids == [0, 1, 2, 3, 4, 5, 9]
