from __future__ import annotations

import json

import pytest
import torch
from models import small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd.data import shards
from beagle_sd.data.conversations import HUMAN, encode_conversation, export_answers, read_conversations, read_messages
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


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_conversation(tokenizer, TURNS)


def test_jsonl_in_both_forms(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello."}]}
    path = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS[:2]}, sharegpt)
    first, second = read_conversations(path, small_tokenizer(), 2048)
    assert first.ids == second.ids and first.learn == second.learn and (first.index, second.index) == (0, 1)
    assert first.temperature == HUMAN
    cut = next(read_conversations(path, small_tokenizer(), 5))
    assert cut.ids == first.ids[:5]


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [',
        '{"text": "x"}',
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '"x"',
        "[1]",
        '{"messages": [{"role": "user"}]}',
        '{"messages": [], "conversations": []}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        list(read_messages(path))


def test_a_conversation_without_an_answer_is_refused(tmp_path):
    path = write_lines(tmp_path / "no.jsonl", {"messages": TURNS[:1]})
    with pytest.raises(ValueError, match="line 1 has no assistant turn.*--regenerate"):
        list(read_conversations(path, small_tokenizer(), 64))


def test_plain_text_is_learned_whole(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 10, encoding="utf-8")
    parts = list(read_conversations(path, small_tokenizer(), 16))
    assert [len(part.ids) for part in parts] == [16, 16, 8] and all(all(part.learn) for part in parts)


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
    first, second = read_conversations(tmp_path / "answers.npz", small_tokenizer(), 2048)
    assert (first.index, first.ids, first.learn) == (1, [9, 10, 2], [False, False, True])
    assert (second.index, second.ids, second.learn) == (3, [5, 6, 7, 8, 2], [False, False, True, True, True])
    assert second.temperature == pytest.approx(0.7)
