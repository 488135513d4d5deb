"""Rows as real sets have them: read as what they say, or left out with the reason, never guessed."""

from __future__ import annotations

import json

import pytest

from beagle_sd.data.conversations import read_messages, read_sources
from beagle_sd.data.rows import LeftOut, Unusable, messages_of, read_text

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def turn(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"messages": [USER, SAID], "prompt": "hi", "tools": [], "images": None}, [USER, SAID]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, [USER, SAID]),
        ({"conversation": [USER, SAID], "model": "x"}, [USER, SAID]),
        ([USER, SAID], [USER, SAID]),
        ({"messages": [USER, SAID], "system": "s"}, [turn("system", "s"), USER, SAID]),
        ({"messages": [turn("system", "s"), USER], "system": "s"}, [turn("system", "s"), USER]),
        ({"messages": [USER], "system": None, "system_prompt": ""}, [USER]),
        ({"messages": [turn("developer", "s"), turn("Human", "hi")]}, [turn("system", "s"), USER]),
        ({"messages": [turn("prompter", "hi")]}, [USER]),
        ({"messages": [turn("user", [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}])]}, [USER]),
        ({"messages": [turn("user", ["h", {"text": "i"}])]}, [USER]),
        ({"messages": [USER, turn("assistant", None)]}, [USER, turn("assistant", "")]),
        ({"messages": [USER, turn("assistant", "hello", thinking="t")]}, [USER, SAID | {"reasoning_content": "t"}]),
        ({"messages": [USER, turn("assistant", "hello", tool_calls=None, name="x")]}, [USER, SAID]),
    ],
)
def test_what_is_read(record, expected):
    assert messages_of(record) == expected


@pytest.mark.parametrize("role", ["assistant", "gpt", "chatgpt", "model", "bing", "bard", "Claude", " bot "])
def test_assistants_by_other_names(role):
    assert messages_of([USER, turn(role, "hello")]) == [USER, SAID]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"messages": [USER, turn("assistant", None, tool_calls=[{"function": {}}])]}, "'tool_calls' beside"),
        ({"messages": [USER, turn("assistant", "", function_call={"name": "f"})]}, "'function_call' beside"),
        ({"messages": [USER, SAID], "tools": [{"name": "f"}]}, "'tools' beside"),
        ({"conversations": [USER, SAID], "image": "a.png"}, "'image' beside"),
        ({"messages": [turn("user", "hi", images=["a.png"]), SAID]}, "'images' beside"),
        (
            {"messages": [turn("user", [{"type": "text", "text": "hi"}, {"type": "image_url"}])]},
            "part of type 'image_url'",
        ),
        ({"messages": [turn("user", 3)]}, "content that is a number"),
        ({"messages": [turn("user", True)]}, "content that is a boolean"),
        ({"messages": [turn("user", {"text": "hi", "type": "audio"})]}, "part of type 'audio'"),
        ({"messages": [turn("user", ["hi", 3])]}, "content that is a number"),
        ({"messages": [turn("user", [["hi"]])]}, "content that is a list"),
        ({"messages": [turn("user", "\ud83d")]}, "surrogate"),
        ({"messages": [USER], "system": 5}, "content that is a number"),
        ({"messages": [turn("system", "one"), USER], "system": "two"}, "beside another system turn"),
        ({"messages": [turn("tool", "x")]}, "role 'tool'"),
        ({"messages": [turn(None, "x")]}, "role None"),
        ({"messages": [turn(3, "x")]}, "role 3"),
        ({"messages": [{"role": "user"}]}, 'without "content"'),
        ({"messages": ["hi"]}, "a turn that is a string"),
        ({"messages": "hi"}, "a conversation that is a string"),
        ({"messages": [], "conversations": []}, "no turns"),
        ({"instruction": "a", "output": "b"}, "its fields are 'instruction', 'output'"),
        ({}, "its fields are none"),
        (None, "a conversation that is null"),
    ],
)
def test_what_is_left_out(record, reason):
    with pytest.raises(Unusable, match=reason):
        messages_of(record)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("layout", ["lines", "array", "indented", "compact"])
@pytest.mark.parametrize("encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_lines_and_arrays_by_either_name(tmp_path, name, layout, encoding, end):
    records = [{"source": "s", "messages": [turn("user", text), SAID]} for text in ("café 😀", "b")]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = {
        "lines": "\n" + "\n\n".join(lines) + "\n",
        "array": "[\n" + ",\n".join(lines) + "\n]\n",
        "indented": json.dumps(records, indent=1),
        "compact": json.dumps(records),
    }[layout]
    path = tmp_path / name
    path.write_bytes(text.replace("\n", end).encode(encoding))
    found = list(read_messages(path, LeftOut(strict=True)))
    assert [messages[0]["content"] for _, messages in found] == ["café 😀", "b"]
    assert [index for index, _ in found] == ([1, 3] if layout == "lines" else [0, 1])
    assert read_sources(path) == {index: "s" for index, _ in found}


def test_a_file_of_one_conversation(tmp_path):
    for name, value in (("a.json", {"messages": [USER, SAID]}), ("b.json", [USER, SAID]), ("c.jsonl", [USER, SAID])):
        (tmp_path / name).write_text(json.dumps(value, indent=name.endswith("n") or None))
        assert list(read_messages(tmp_path / name)) == [(0, [USER, SAID])]
    (tmp_path / "d.jsonl").write_text(2 * (json.dumps([USER, SAID]) + "\n"))
    assert list(read_messages(tmp_path / "d.jsonl")) == [(0, [USER, SAID]), (1, [USER, SAID])]
    (tmp_path / "e.json").write_text("[]")
    assert list(read_messages(tmp_path / "e.json")) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_bytes(json.dumps([{"messages": [USER]}]).encode(encoding))
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text.*UTF-16.*allowed: UTF-8"):
            read_text(tmp_path / name) if name.endswith("txt") else list(read_messages(tmp_path / name))


def test_a_json_file_that_is_cut_short(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": [USER]}], indent=1)[:-3])
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*allowed: an array of conversations, or one a line"):
        list(read_messages(path))


def test_the_commonest_reasons_are_told_first_and_the_rest_together():
    left = LeftOut()
    for number in range(12):
        for line in range(12 - number):
            left.add(f"a.jsonl: line {line + 1}", f"reason {number}")
    lines = left.lines()
    assert len(lines) == 9 and lines[0] == "left out 12: reason 0 (first: a.jsonl: line 1)"
    assert lines[-1] == "left out 10 for 4 other reasons" and left.count == 78
