"""Documents and code with a question, and chats of which only the user's turns are given."""

from __future__ import annotations

import json
import random

import pytest

from beagle_sd.data.evaluation_sets import EVALUATION_SETS, evaluation_ngrams, ngrams
from beagle_sd.data.prompts import long, templates, turns
from beagle_sd.data.prompts.build import build_prompts

PARAGRAPHS = [
    f"Paragraph {number} tells of harbours, lanterns and the weather of day {number}." for number in range(700)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three texts and one source; the standard library is left out, which takes long to read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(long.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    harbour = tmp_path / "documents" / "harbour"
    harbour.mkdir(parents=True)
    (harbour / "long.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    (harbour / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "documents" / "pages").mkdir()
    page = (
        "<head><title>T</title></head><p>A  pier\nof wood.<pre>x =  1\ny</pre><script>no()</script><p>" + "Sea. " * 999
    )
    (tmp_path / "documents" / "pages" / "one.html").write_text(page, encoding="utf-8")
    (tmp_path / "library").mkdir()
    functions = [f"def moor_{n}(boat):\n    return boat.tie(knots={n})" for n in range(400)]
    (tmp_path / "library" / "mooring.py").write_text("\n\n".join(functions), encoding="utf-8")
    return tmp_path


def test_a_document_and_code_come_with_a_question(folder):
    rows = build_prompts(80, 3, {"long-documents": 1, "long-code": 1}, folder)
    assert rows == build_prompts(80, 3, {"long-documents": 1, "long-code": 1}, folder)
    assert len(rows) == 80 and {row["source"] for row in rows} == {"long-documents", "long-code"}
    data = templates.text_file("long.json")
    for row in rows:
        (message,) = row["messages"]
        kind = row["source"].removeprefix("long-").removesuffix("s")
        tokens = len(message["content"]) / long.CHARACTERS[kind]
        assert 0.4 * long.SHORTEST < tokens < 1.2 * long.LONGEST
        starts = [question.split("{")[0].split("`")[0] for question in data[kind]]
        assert any(start and start in message["content"] for start in starts), "a question"
        assert any(text in message["content"] for text in ("of day", "Sea. Sea.", "boat.tie")), "its text"
        assert "{" not in message["content"], "every slot is filled"
    sizes = sorted(len(row["messages"][0]["content"]) for row in rows)
    assert sizes[-1] > 6 * sizes[0], "of all lengths"


def test_a_page_is_its_text(folder):
    page = long._plain(folder / "documents" / "pages" / "one.html")
    assert page.startswith("A pier of wood.\n\nx =  1\ny\n\nSea. Sea.") and "no()" not in page and "T" not in page
    rst = folder / "a.rst.txt"
    rst.write_text(".. note::\n   :class: x\n\nSee :func:`~os.path` and `this <http://x>`_.\n", encoding="utf-8")
    assert long._plain(rst) == "See os.path and this."


def test_a_chat_has_turns_of_the_user_alone(folder):
    found = turns.chats(random.Random(5), 60, folder)
    assert len(set(found)) == len(found) == 60
    assert all(turns.FEWEST <= len(chat) <= turns.MOST and all(chat) for chat in found)
    assert {len(chat) for chat in found} > {3, 4, 5} and max(map(len, found)) > 20
    about = [chat for chat in found if any(text in chat[0] for text in ("of day", "Sea. Sea.", "boat.tie"))]
    assert 5 < len(about) < 30, "some ask about one text"
    assert not any("{" in turn for chat in found if chat not in about for turn in chat[1:] if "def " not in turn)
    rows = build_prompts(5, 5, {"chats": 1}, folder)
    assert (
        all(message["role"] == "user" for row in rows for message in row["messages"]) and len(rows[0]["messages"]) > 2
    )


def test_what_people_said_is_one_side_of_their_chat(folder):
    said = ["hi", "hello", "how is the sea", "calm", "and the wind", "it sleeps", "bye", "bye then"]
    rude = ["you", "are", "a", "bitch", "you", "know"]
    path = folder / "chitchat_dataset" / "dataset.json"
    path.parent.mkdir()
    chats = {str(n): {"messages": [[{"text": text}] for text in chat]} for n, chat in enumerate((said, rude, said[:2]))}
    path.write_text(json.dumps(chats))
    assert turns._people(folder) == [said[::2], said[1::2]]
    assert any(chat[0] in ("hi", "hello") for chat in turns.chats(random.Random(1), 30, folder))


def test_a_long_prompt_that_shares_words_with_an_evaluation_set_is_dropped(folder):
    path = folder / EVALUATION_SETS["mt-bench"].member
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question_id": 1, "category": "x", "turns": [PARAGRAPHS[350]]}))
    barred = evaluation_ngrams(["mt-bench"], folder)
    rows = build_prompts(60, 3, {"long-documents": 2, "chats": 1}, folder)
    assert 30 < len(rows) < 60
    assert not any(ngrams(message["content"]) & barred for row in rows for message in row["messages"])


def test_where_no_documents_are_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="long-documents: .*documents holds no folder"):
        build_prompts(5, 0, {"long-documents": 1}, tmp_path)
