"""Chats of which only the user's turns are given: the target writes every answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from beagle_sd.data.evaluation_sets import wheel_file
from beagle_sd.data.prompts.long import about_one_text
from beagle_sd.data.prompts.templates import Filler, asked, text_file

FEWEST, MOST = 3, 30
"""Turns of the user in a chat, even on a logarithmic scale."""


def chats(rng: random.Random, count: int, folder: Path) -> list[tuple[str, ...]]:
    """Chats of three kinds: half go on from a template's prompt, a quarter are one side of a chat between people, a
    quarter ask about one document or piece of code. Where the files of a kind are not there, the first is in place."""
    people = _people(folder)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(4 * count):
        turns = round(FEWEST * (MOST / FEWEST) ** rng.random())
        kind = rng.random()
        if kind < 0.25 and people:
            found[_as_said(rng, people, turns)] = None
        elif kind > 0.75:
            found[_with_follow_ups(rng, about_one_text(rng, turns, folder), turns)] = None
        else:
            found[_with_follow_ups(rng, [asked(rng)], turns)] = None
        if len(found) == count:
            break
    return list(found)


def _with_follow_ups(rng: random.Random, given: list[str], turns: int) -> tuple[str, ...]:
    """The given turns in order, and between and behind them follow-ups and new questions, `turns` in all."""
    following = text_file("long.json")["follow_ups"]
    others = [
        Filler(rng)(rng.choice(following)) if rng.random() < 0.7 else asked(rng)
        for _ in range(max(0, turns - len(given)))
    ]
    places = sorted(rng.sample(range(1, turns), min(len(given), turns) - 1))
    for place, turn in zip(places, given[1:]):
        others.insert(place - 1, turn)
    return given[0], *others


def _people(folder: Path) -> list[list[str]]:
    """What either side says in each chat between people, without unfit words; empty where the file is not there."""
    try:
        path = wheel_file("chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json", folder, download=False)
    except FileNotFoundError:
        return []
    unfit = set(text_file("templates.json")["unfit_words"])
    sides = []
    for chat in json.loads(path.read_text(encoding="utf-8")).values():
        said = [" ".join(message["text"].strip() for message in turn) for turn in chat["messages"]]
        if not unfit & set(" ".join(said).lower().split()):
            sides += [side for side in (said[::2], said[1::2]) if len(side) >= FEWEST and all(side)]
    return sides


def _as_said(rng: random.Random, people: list[list[str]], turns: int) -> tuple[str, ...]:
    return tuple(rng.choice(people)[:turns])
