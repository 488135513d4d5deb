"""Long training prompts: documents and code with a question, and chats in which the target writes every answer.

Documents and code are whatever lies in folders of the prompts' folder, so that anyone's own texts can be used; what
was used here is named in docs/train.md. Lengths are even on a logarithmic scale.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from beagle_sd.data.prompts.templates import text_file

SHORTEST, LONGEST = 300, 6000
"""Tokens of a document with its question, about: a token is taken for CHARACTERS characters."""
_QUESTION = 20
CHARACTERS = {"document": 4.0, "code": 3.4}
_LANGUAGES = {".py": "python", ".js": "javascript", ".c": "c", ".h": "c", ".go": "go", ".rs": "rust", ".java": "java"}
_PROSE = (".txt", ".rst", ".md", ".html")
_SKIPPED = {"script", "style", "nav", "footer", "head"}
_BLOCKS = set("p div li ul ol dl dt dd h1 h2 h3 h4 h5 pre table tr section".split())


class _Text(NamedTuple):
    name: str
    language: str
    text: str


class _Page(HTMLParser):
    """The text of a web page, a blank line between blocks, blanks joined but in <pre>."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = self.kept = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipped += tag in _SKIPPED
        self.kept += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in _SKIPPED
        self.kept -= tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.skipped <= 0:
            self.parts.append(data if self.kept > 0 else re.sub(r"\s+", " ", data))


def _plain(path: Path) -> str:
    """A file's text without the marks of HTML or reStructuredText; "" for one that is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix == ".html":
        page = _Page()
        page.feed(text)
        text = "".join(page.parts).replace("\u00b6", "")
    elif ".rst" in path.suffixes:
        text = re.sub(r"^\.\. [\w-]+::? ?|^ +:[\w-]+:.*$", "", text, flags=re.M)
        text = re.sub(r"(?::[a-z:]+:)?`[!~]?([^`<]+?)(?:\s<[^`]*>)?`(?:__?\b)?", r"\1", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@cache
def _documents(folder: Path) -> list[list[_Text]]:
    """The texts of each folder in `documents`, and of Python's documentation."""
    homes = [home for home in sorted((folder / "documents").glob("*")) if home.is_dir()]
    homes += [home for home in [folder / "python-docs"] if home.is_dir()]
    groups = _groups([path for path in sorted(home.rglob("*")) if path.suffix in _PROSE] for home in homes)
    if not groups:
        raise FileNotFoundError(f"{folder / 'documents'} holds no folder of {', '.join(_PROSE)} files")
    return groups


@cache
def _code(folder: Path) -> list[list[_Text]]:
    """The sources of each folder in `code`, and of the running Python's standard library without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "site-packages"}
    found = [path for path in sorted(library.rglob("*.py")) if not apart & set(path.relative_to(library).parts)]
    homes = [home for home in sorted((folder / "code").glob("*")) if home.is_dir()]
    paths = [found, *([path for path in sorted(home.rglob("*")) if path.suffix in _LANGUAGES] for home in homes)]
    groups = _groups([path for path in files if path.stat().st_size > 800] for files in paths)
    if not groups:
        raise FileNotFoundError(f"neither {library} nor {folder / 'code'} holds source files")
    return groups


def _groups(folders: Iterable[list[Path]]) -> list[list[_Text]]:
    """The texts of each folder's files that have one, of the folders that have any."""
    read = ([_Text(path.name, _LANGUAGES.get(path.suffix, ""), _plain(path)) for path in files] for files in folders)
    return [group for texts in read if (group := [one for one in texts if one.text])]


def _passage(rng: random.Random, groups: list[list[_Text]], characters: int) -> _Text:
    """About so many characters of one text, from a paragraph's beginning on; every group has an equal share."""
    group = rng.choice(groups)
    fitting = [one for one in group if len(one.text) >= characters] or [max(group, key=lambda one: len(one.text))]
    chosen = rng.choices(fitting, [len(one.text) for one in fitting])[0]
    last = len(chosen.text) - characters
    starts = [0, *(found.end() for found in re.finditer(r"\n\n(?=\S)", chosen.text[: max(0, last)]))]
    start = rng.choice(starts)
    cut = chosen.text[start : start + characters]
    end = max(cut.rfind("\n", len(cut) // 2), cut.rfind(". ", len(cut) // 2) + 1)
    return chosen._replace(text=cut[:end].rstrip() if end > 0 else cut)


def _terms(rng: random.Random, text: str, code: bool) -> dict[str, str]:
    """Two things a question can be about: names that are defined, or longer words that come up often."""
    found = re.findall(r"(?:def|class|function|func|fn)\s+([A-Za-z]\w{2,})", text) if code else []
    words = found or re.findall(r"\b[A-Za-z][a-z]{5,}\b", text) or ["it"]
    common = [word for word, _ in Counter(words).most_common(12)]
    return {"term": rng.choice(common), "term2": rng.choice(common[::-1])}


def _question(rng: random.Random, kind: str, text: str) -> str:
    question = rng.choice(text_file("long.json")[kind])
    for name, term in _terms(rng, text, kind == "code").items():
        question = question.replace(f"{{{name}}}", term)
    return question


def _framed(rng: random.Random, kind: str, chosen: _Text, question: str) -> str:
    frame = rng.choice(text_file("long.json")[f"{kind}_frames"])
    values = {"question": question, "text": chosen.text, "name": chosen.name, "language": chosen.language}
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], frame)


def _asked(rng: random.Random, kind: str, groups: list[list[_Text]]) -> str:
    """One prompt: a text of about SHORTEST to LONGEST tokens and a question about it."""
    tokens = SHORTEST * (LONGEST / SHORTEST) ** rng.random()
    chosen = _passage(rng, groups, round((tokens - _QUESTION) * CHARACTERS[kind]))
    return _framed(rng, kind, chosen, _question(rng, kind, chosen.text))


def documents(rng: random.Random, count: int, folder: Path) -> list[str]:
    """Passages of `documents` and of Python's documentation, with a question."""
    groups = _documents(folder)
    return [_asked(rng, "document", groups) for _ in range(count)]


def code(rng: random.Random, count: int, folder: Path) -> list[str]:
    """Sources of `code` and of the standard library, with a question."""
    groups = _code(folder)
    return [_asked(rng, "code", groups) for _ in range(count)]


def about_one_text(rng: random.Random, turns: int, folder: Path) -> list[str]:
    """A chat's questions about one document or source of up to 1,500 tokens, the text with the first: up to half of
    its turns. Where there are no documents, about code."""
    kind = rng.choice(["document", "code"])
    try:
        groups = _documents(folder) if kind == "document" else _code(folder)
    except FileNotFoundError:
        kind, groups = "code", _code(folder)
    chosen = _passage(rng, groups, round(SHORTEST * 5 ** rng.random() * CHARACTERS[kind]))
    questions = [_question(rng, kind, chosen.text) for _ in range(max(1, turns // 2))]
    return [_framed(rng, kind, chosen, questions[0]), *questions[1:]]
