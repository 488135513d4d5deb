"""Prompts made here: templates in the words users write to an assistant, and lists that fill their slots.

`texts/templates.json` holds the templates, `topics.json` what fills their slots, `functions.json` small programming
tasks. A slot `{name}` is filled once per prompt; `{name2}` takes another entry of the same list; `{int 2 9}` is a fresh
number; entries may hold slots themselves; `a(n)` becomes the article that fits.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"


@cache
def text_file(name: str):
    """What a file of `texts` holds."""
    return json.loads((TEXTS / name).read_text(encoding="utf-8"))


class Filler:
    """Fills the slots of one prompt; a slot that comes again stands for the same thing."""

    SLOT = re.compile(r"\{(?:int (?P<low>\d+) (?P<high>\d+)|(?P<slot>(?P<list>[a-z_]+)\d?))\}")

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.values: dict[str, str] = {}
        self.used: set[str] = set()

    def __call__(self, template: str) -> str:
        return article(self.SLOT.sub(self._value, template))

    def _value(self, match: re.Match) -> str:
        if match["low"] is not None:
            return str(self.rng.randint(int(match["low"]), int(match["high"])))
        slot = match["slot"]
        if slot not in self.values:
            if slot.startswith("pyfunc_"):
                self.values.update(function_slots(self.rng.choice(text_file("functions.json"))))
            else:
                entry = self.rng.choice([e for e in text_file("topics.json")[match["list"]] if e not in self.used])
                self.used.add(entry)
                self.values[slot] = self(entry)
        return self.values[slot]


def function_slots(task: dict[str, str]) -> dict[str, str]:
    signature, does, example = task["signature"], task["does"], task["example"]
    call, result = example.rsplit(" == ", 1)
    return {
        "pyfunc_name": f"`{signature.split('(')[0]}`",
        "pyfunc_doc": does,
        "pyfunc_signature": f"def {signature}:",
        "pyfunc_example": f"`{example}`",
        "pyfunc_stub": f'def {signature}:\n    """{does}\n\n    >>> {call}\n    {result}\n    """',
    }


def article(text: str) -> str:
    return re.sub(r"(?i)\b(a)\(n\)(?= ((?!uni|eu|one)[aeiou])?)", lambda m: m[1] + ("n" if m[2] else ""), text)


def _users_hand(text: str, rng: random.Random) -> str:
    """Some users greet, some add a wish, some skip capitals and full stops."""
    data, plain = text_file("templates.json"), "\n" not in text
    if plain and len(text) < 150 and rng.random() < 0.12:
        closer = Filler(rng)(rng.choice(data["closers"]))
        text = f"{text if text[-1] in '.?!' else text + '.'} {closer}"
    if plain and rng.random() < 0.05:
        text = f"{rng.choice(data['openers'])} {text}"
    if plain and rng.random() < 0.06:
        text = text.lower().rstrip(".")
    return text


def asked(rng: random.Random) -> str:
    """One prompt from a template."""
    groups = list(text_file("templates.json")["groups"].values())
    group = rng.choices(groups, [group["weight"] for group in groups])[0]
    text = Filler(rng)(rng.choice(group["templates"]))
    if not text.startswith("def "):
        text = text[0].upper() + text[1:]
    return _users_hand(text, rng)


def templates(rng: random.Random, count: int, folder: Path) -> list[str]:
    """Up to `count` distinct prompts; no file is needed."""
    texts: dict[str, None] = {}
    for _ in range(4 * count):
        texts[asked(rng)] = None
        if len(texts) == count:
            break
    return list(texts)
