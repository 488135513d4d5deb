"""Files of conversations, row by row: each becomes turns of system, user and assistant, or is left out and counted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bard", "bing", "claude", "gemini", "palm"),
        "assistant",
    ),
}
_TURNS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_CONTENT = ("content", "value", "text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MORE_THAN_TEXT = (
    *("tools", "functions", "tool_calls", "function_call", "documents"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
"""Fields that change what the target would be shown: a row in which one of them holds something is not its text."""
_BOM = b"\xef\xbb\xbf"
_SHOWN = 8
"""Reasons that are told one by one."""


class Unusable(ValueError):
    """A row cannot be used; the message is the reason, without its place."""


class LeftOut:
    """The rows of a file that are not used: `reasons` maps each reason to how many rows and the place of the first.

    strict: the first such row raises ValueError naming its place instead.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.reasons: dict[str, tuple[int, str]] = {}

    def add(self, place: str, reason: object) -> None:
        """Note a row: its file and line, and why it is left out."""
        if self.strict:
            raise ValueError(f"{place}: {reason}; such a row is left out unless strict")
        count, first = self.reasons.get(str(reason), (0, place))
        self.reasons[str(reason)] = count + 1, first

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def lines(self) -> list[str]:
        """How many rows for each reason, the commonest first."""
        ranked = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        shown = [f"left out {count}: {reason} (first: {place})" for reason, (count, place) in ranked[:_SHOWN]]
        rest = [count for _, (count, _) in ranked[_SHOWN:]]
        return shown + ([f"left out {sum(rest)} for {len(rest)} other reasons"] if rest else [])

    def nothing_in(self, path: str | Path) -> ValueError:
        """The error of a file of which no row is used."""
        return ValueError(f"{path} holds nothing to learn from: {'; '.join(self.lines()) or 'it is empty'}")


@contextmanager
def counting(left: LeftOut | None) -> Iterator[LeftOut]:
    """`left`, or where there is none a new one, of which a warning tells in the end."""
    found = LeftOut() if left is None else left
    yield found
    if left is None and found.count:
        warnings.warn("; ".join(found.lines()), stacklevel=4)


def read_text(path: str | Path) -> str:
    """A file's text, without a byte order mark; ValueError unless it is UTF-8."""
    _check_encoding(Path(path))
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); allowed: UTF-8") from error


def read_records(path: str | Path, left: LeftOut) -> Iterator[tuple[int, str, Any]]:
    """(index, place, record) of a file of JSON lines, or of one JSON array, whatever its name ends in: the index counts
    lines, blank ones too, or the array's items. ValueError for a file that is not UTF-8, or a .json that is no JSON."""
    path = Path(path)
    _check_encoding(path)
    if (items := _array(path)) is not None:
        for index, item in enumerate(items):
            yield index, f"{path}: item {index + 1}", item
        return
    with path.open("rb") as file:
        for index, line in enumerate(file):
            place = f"{path}: line {index + 1}"
            try:
                if line.removeprefix(_BOM).strip():
                    yield index, place, _parsed(line)
            except Unusable as reason:
                left.add(place, reason)


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(256)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        raise ValueError(f"{path} is not UTF-8 text: it looks like UTF-16, as PowerShell writes it; allowed: UTF-8")


def _array(path: Path) -> list | None:
    """The records of a file that is one JSON value; None for a file of lines."""
    named = path.suffix.lower() == ".json"
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(_BOM).strip()), b"").removeprefix(_BOM).lstrip()
    array, alone = first.startswith(b"["), _is_json(first)
    if not first or not array and (alone or not named):
        return None
    try:
        whole = _parsed(path.read_bytes())
    except Unusable as reason:
        if named and not alone:
            raise ValueError(f"{path} is {reason}; allowed: an array of conversations, or one a line") from reason
        return None
    turns = isinstance(whole, list) and all(isinstance(one, dict) and {"role", "from"} & set(one) for one in whole)
    return whole if isinstance(whole, list) and not (whole and turns) else [whole]


def _is_json(content: bytes) -> bool:
    try:
        _parsed(content)
    except Unusable:
        return False
    return True


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.removeprefix(_BOM).decode())
    except json.JSONDecodeError as error:
        raise Unusable(f"not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"no JSON that can be read ({error})") from error


def messages_of(record: Any) -> list[dict]:
    """A record's turns: {"role": "system", "user" or "assistant", "content": str}, an assistant's with
    "reasoning_content" where the record has its thoughts apart. Unusable, with the reason, for what is not text alone.
    """
    if isinstance(record, dict):
        _check_text_alone(record)
        name = next((name for name in _TURNS if record.get(name)), None)
        if name is None and not set(_TURNS) & set(record):
            fields = ", ".join(map(repr, list(record)[:6])) or "none"
            raise Unusable(f'no "messages" and no "conversations": its fields are {fields}')
        turns = record[name] if name else []
    else:
        turns = record
    if not isinstance(turns, list):
        raise Unusable(f"a conversation that is {_kind(turns)}, not a list of turns")
    messages = [_message(turn) for turn in turns]
    if not messages:
        raise Unusable("no turns")
    system = _system(record) if isinstance(record, dict) else ""
    if system and messages[0]["role"] == "system" and messages[0]["content"] != system:
        raise Unusable("a field of system beside another system turn")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _system(record: dict) -> str:
    return next((text for name in _SYSTEM if (text := _text(record.get(name)))), "")


def _message(turn: Any) -> dict:
    if not isinstance(turn, dict):
        raise Unusable(f"a turn that is {_kind(turn)}, not an object")
    _check_text_alone(turn)
    said = turn.get("role") or turn.get("from")
    role = _ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise Unusable(f"a turn of role {said!r}")
    name = next((name for name in _CONTENT if name in turn), None)
    if name is None:
        raise Unusable('a turn without "content"')
    message = {"role": role, "content": _text(turn[name])}
    thoughts = next((turn[name] for name in _REASONING if isinstance(turn.get(name), str) and turn[name].strip()), "")
    return message | ({"reasoning_content": _text(thoughts)} if thoughts and role == "assistant" else {})


def _text(content: Any) -> str:
    """What a turn says: a string, or the text parts of a list joined; "" for null."""
    parts = content if isinstance(content, list) else [content]
    text = "".join(map(_part, parts))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("text with half of a surrogate pair, which is no character") from None
    return text


def _part(part: Any) -> str:
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise Unusable(f"a part of type {kind!r}, which is not text")
        part = part.get("text")
    if part is None or isinstance(part, str):
        return part or ""
    raise Unusable(f"content that is {_kind(part)}, not text")


def _check_text_alone(fields: dict) -> None:
    for name in _MORE_THAN_TEXT:
        if fields.get(name) not in (None, False, "", "[]", "{}", [], {}):
            raise Unusable(f"the field {name!r} beside the text")


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
