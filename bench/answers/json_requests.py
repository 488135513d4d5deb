"""Requests for answers in JSON: five schemas, ten requests of each, and whether an answer is one of its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class JsonRequest(NamedTuple):
    """What is asked, and the name in SCHEMAS of what the answer is to be."""

    schema: str
    text: str


def _object(**properties: dict) -> dict:
    """Of these properties, all of which have to come, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int) -> dict:
    return {"type": "string", "maxLength": most}


def _whole(least: int, most: int) -> dict:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: dict, least: int, most: int) -> dict:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS: dict[str, dict] = {
    "place": _object(
        name=_text(30),
        kind={"enum": ["city", "river", "mountain", "lake", "island", "desert"]},
        continent={"enum": ["Africa", "America", "Antarctica", "Asia", "Europe", "Oceania"]},
        known_for=_text(60),
        visited=_whole(0, 100),
    ),
    "person": _object(
        name=_object(first=_text(20), last=_text(20)),
        born=_whole(1000, 2000),
        field={"enum": ["science", "art", "music", "politics", "literature"]},
        works=_list(_text(40), 1, 3),
        alive={"type": "boolean"},
    ),
    "recipe": _object(
        dish=_text(30),
        minutes=_whole(1, 240),
        vegetarian={"type": "boolean"},
        ingredients=_list(_object(item=_text(20), grams=_whole(1, 2000)), 2, 4),
    ),
    "order": _object(
        customer=_text(20),
        item=_object(name=_text(30), colour={"enum": ["red", "green", "blue", "black", "white", None]}),
        price={"type": "number", "minimum": 0, "maximum": 5000},
        delivery=_object(
            days=_whole(1, 30), express={"type": "boolean"}, address=_object(city=_text(20), zip=_text(8))
        ),
    ),
    "review": _object(
        title=_text(40),
        stars=_whole(1, 5),
        mood={"enum": ["good", "mixed", "bad"]},
        pros=_list(_text(40), 0, 3),
        cons=_list(_text(40), 0, 3),
        scores=_list(_list({"type": "number", "minimum": 0, "maximum": 10}, 2, 2), 1, 3),
    ),
}
_ASKED: dict[str, tuple[str, tuple[str, ...]]] = {
    "place": (
        "Describe {} as JSON with its name, its kind, its continent, what it is known for, and how many per cent of "
        "travellers have been there.",
        (
            "Lisbon", "the Nile", "Mount Fuji", "Lake Victoria", "Madagascar", "the Gobi", "Buenos Aires", "the Rhine",
            "Tasmania", "Denali",
        ),
    ),
    "person": (
        "Who was or is {}? Answer as JSON: the first and the last name, the year of birth, the field, some works, and "
        "whether the person is alive.",
        (
            "Marie Curie", "Pablo Picasso", "Johann Sebastian Bach", "Nelson Mandela", "Jane Austen", "Isaac Newton",
            "Frida Kahlo", "Ludwig van Beethoven", "Winston Churchill", "Toni Morrison",
        ),
    ),
    "recipe": (
        "Give me a recipe for {} as JSON: the dish, the minutes it takes, whether it is vegetarian, and the "
        "ingredients with their grams.",
        (
            "pancakes", "lentil soup", "fried rice", "a potato salad", "spaghetti with tomatoes", "an apple pie",
            "chicken curry", "a mushroom omelette", "bean burritos", "grilled salmon",
        ),
    ),
    "order": (
        "Write this order as JSON, with the customer, the item and its colour, the price in dollars and the delivery: "
        "{}.",
        (
            "Anna Lopez from Madrid, 28001, wants a red bicycle for 349.90, in 5 days",
            "a black office chair for Tom Becker in Berlin, 10115, 129 dollars, express, tomorrow",
            "Mei Chen, Taipei, 100, a blue rain coat, 59.50, within a week",
            "two weeks are fine for Omar Haddad's white bookshelf, 210 dollars, to Cairo, 11511",
            "Ines Rocha in Porto, 4000, takes the green tent at 180.25, express in 2 days",
            "a white lamp, 35 dollars, to Lars Holm in Oslo, 0150, in 10 days",
            "Priya Nair of Kochi, 682001, ordered a blue suitcase for 89.99, 6 days",
            "John Smith, Boston, 02108, one black kettle, 24.95, express, 1 day",
            "a red armchair for Chloe Martin in Lyon, 69001, 420 dollars, three weeks",
            "Kofi Mensah, Accra, GA100, a green backpack at 64, in 8 days",
        ),
    ),
    "review": (
        "Review {} as JSON: a title, one to five stars, the mood, what is good, what is bad, and a few pairs of scores "
        "for use and price.",
        (
            "a cheap umbrella", "a noisy hotel by the sea", "an electric toothbrush", "a cookbook for students",
            "a slow laptop", "a folding bicycle", "a pair of running shoes", "a crowded museum", "a weather app",
            "a night train",
        ),
    ),
}  # fmt: skip


def requests(count: int) -> list[JsonRequest]:
    """`count` of the 50, the schemas in turn."""
    lengths = {len(subjects) for _, subjects in _ASKED.values()}
    found = [
        JsonRequest(name, asked.format(subjects[number]))
        for number in range(min(lengths))
        for name, (asked, subjects) in _ASKED.items()
    ]
    return found[:count]


def is_valid(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether the text as a whole is JSON by the schema; ValueError for a keyword that is not looked at here."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return fits(value, schema)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is one of the schema, by the keywords that SCHEMAS has."""
    if unknown := schema.keys() - _KEYWORDS:
        raise ValueError(f"the schema has {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(_KEYWORDS))}")
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "object":
        named = schema["properties"]
        missing, others = set(schema["required"]) - value.keys(), value.keys() - named.keys()
        return not missing and not others and all(fits(one, named[name]) for name, one in value.items())
    if kind == "array":
        return _within(len(value), schema, "minItems", "maxItems") and all(fits(one, schema["items"]) for one in value)
    if kind == "string":
        return _within(len(value), schema, "minLength", "maxLength")
    return kind == "boolean" or _within(value, schema, "minimum", "maximum")


def _within(value: float, schema: Mapping[str, Any], least: str, most: str) -> bool:
    return schema.get(least, value) <= value <= schema.get(most, value)


_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
}
_KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "enum", "items", "minItems", "maxItems"),
    *("minLength", "maxLength", "minimum", "maximum"),
}
