"""Masks along a tree are those of a matcher that took each path alone, and a walk is left where it was."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from guide_cases import ENDS, SCHEMA, TEXT, check_text, fresh_walk, mask_of, plain_text, random_paths, tokens_of

from beagle_sd.decoding.guides.guide import Guide

PADDED = 49152 + 40
"""Of the vocabulary; no multiple of 32, and more than the tokenizer's."""


@pytest.fixture(params=["schema", "pattern"])
def guided(request, tokenizer, library):
    """A guide, and the tokens of a text by it."""
    if request.param == "schema":
        made = Guide.json(PADDED, tokenizer, SCHEMA, whitespace=False, library=library, end_tokens=ENDS)
        return made, tokenizer(TEXT).input_ids
    made = Guide.regex(PADDED, tokenizer, r"(\d{3}-\d{4}|[a-c]+é?)", library=library, end_tokens=ENDS)
    return made, tokenizer("123-4567").input_ids


@pytest.mark.parametrize("wild", [0.0, 0.3])
def test_a_tree_has_the_masks_of_each_path_alone(guided, wild):
    guide, text = guided
    rng = random.Random(1)
    for cut in (0, len(text) // 3, len(text) // 2, len(text) - 1, len(text)):
        walk = guide.begin()
        walk.accept(text[:cut])
        paths = random_paths(guide, text[:cut], 12, rng, wild)
        found = mask_of(walk, *paths)
        for path, mask in zip(paths, found):
            alone = fresh_walk(guide, [*text[:cut], *path])
            if alone is None or guide.ends & set(path):
                assert bool((mask == -1).all()), path
            else:
                assert mask.equal(mask_of(alone)[0]), path
        assert mask_of(walk, *paths).equal(found)
        walk.accept(text[cut:])
        assert tokens_of(mask_of(walk)[0]) == sorted(ENDS) and walk.ended


def test_masks_do_not_depend_on_what_was_asked_before(guided):
    guide, text = guided
    asked, silent = guide.begin(), guide.begin()
    for number, token in enumerate(text):
        mask_of(asked, [token], text[number : number + 4], [], [token, 5])
        asked.forced(5)
        asked.accept([token])
        silent.accept([token])
    assert mask_of(asked).equal(mask_of(silent))
    for number, token in enumerate(text):
        assert token in tokens_of(mask_of(guide.begin(), text[:number])[0])


def test_the_text_of_a_mask_is_accepted_and_another_token_named(guided, tokenizer):
    guide, text = guided
    walk = guide.begin()
    walk.accept(text[:3])
    before = mask_of(walk)
    wrong = tokenizer("Z").input_ids[0]
    for bad in (wrong, guide.vocab_size - 1, guide.vocab_size, 10**7, -1, 2):
        with pytest.raises(ValueError, match=rf"token {bad} was emitted as number 4 of the text"):
            walk.accept([text[3], bad])
        assert mask_of(walk).equal(before)
    walk.accept(text[3:])


def test_behind_an_end_token_nothing_matters(guided):
    guide, text = guided
    walk = guide.begin()
    assert not walk.ended
    walk.accept(text)
    assert walk.ended and walk.forced(4) == []
    assert bool((mask_of(walk, [2], [0, 5], [2, 2]) == -1).all())
    assert tokens_of(mask_of(walk)[0]) == [0, 2]
    walk.accept([0, 17, 10**7])
    assert walk.ended and walk.forced(4) == []
    assert bool((mask_of(walk, [], [5]) == -1).all())
    walk.accept([1])


def test_forced_tokens_are_those_of_masks_with_one_token(guided):
    guide, text = guided
    for cut in range(len(text) + 1):
        walk = guide.begin()
        walk.accept(text[:cut])
        stepped, expected = fresh_walk(guide, text[:cut]), []
        while len(expected) < 6 and len(allowed := tokens_of(mask_of(stepped)[0])) == 1:
            expected += allowed
            stepped.accept(allowed)
        for most in (0, 1, 2, 6):
            assert walk.forced(most) == expected[:most]
        assert mask_of(walk).equal(mask_of(fresh_walk(guide, text[:cut]))), "the walk has moved"


def test_forced_includes_a_single_end_token_and_stops_there(tokenizer, library):
    guide = Guide.regex(PADDED, tokenizer, "xq", library=library, end_tokens=2)
    walk = guide.begin()
    walk.accept(tokenizer("x").input_ids)
    assert walk.forced(9) == [*tokenizer("q").input_ids, 2]
    assert walk.forced(1) == tokenizer("q").input_ids


def test_wider_masks_have_no_tokens_beyond_the_guides(guided):
    guide, _ = guided
    words = guide.vocabulary.words
    out = torch.full((2, 2 * words + 6), 7, dtype=torch.int32)[:, ::2]
    guide.begin().masks([[], [10**7]], out)
    assert out[0, :words].equal(mask_of(guide.begin())[0]) and not bool(out[0, words:].any())
    assert bool((out[1] == -1).all())
    assert all(token < 49152 for token in tokens_of(out[0]))
    guide.begin().masks([], out[:0])
    for wrong in (out[:1], out[:, : words - 1], out.long()):
        with pytest.raises(ValueError, match="allowed"):
            guide.begin().masks([[], []], wrong)


@pytest.mark.parametrize("seed", range(3))
def test_plain_text_under_masks_is_by_the_schema(tokenizer, library, seed):
    rng = random.Random(seed)
    guide = Guide.json(PADDED, tokenizer, SCHEMA, whitespace=False, library=library, end_tokens=ENDS)
    tokens = plain_text(guide, tokenizer, rng.choice, 400)
    check_text(tokenizer.decode(tokens[:-1]))


def test_texts_share_a_guide(guided):
    guide, text = guided
    expected = [mask_of(fresh_walk(guide, text[:cut])) for cut in range(len(text))]
    walks = [guide.begin() for _ in range(4)]
    for cut, token in enumerate(text):
        for walk in walks[:2]:
            assert mask_of(walk).equal(expected[cut])
        walks[cut % 2].accept([token])
        walks[1 - cut % 2].accept([token])

    def run(walk) -> bool:
        same = True
        for cut, token in enumerate(text):
            same &= mask_of(walk, [], [token], text[cut : cut + 3])[0].equal(expected[cut][0])
            walk.accept([token])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, [*walks[2:], *(guide.begin() for _ in range(6))]))
