"""What walks share, over a grammar that lists its texts: each beginning of a path is walked once."""

from __future__ import annotations

import pytest
import torch
from guide_cases import ListedGuide, mask_of, tokens_of

SIZE, END = 77, 76
TEXTS = [[1, 2, 3, 31, 5], [1, 2, 4], [1, 32, 3], [63], [64, 64]]


@pytest.fixture
def walk():
    return ListedGuide(TEXTS, SIZE, [END], never=[70]).begin()


def calls(walk, kind: str) -> list[int]:
    return [value for name, value in walk.calls if name == kind]


def test_each_beginning_is_walked_once_and_each_refused_token_tried_once(walk):
    paths = [[1, 2, 4], [], [1, 9, 9], [1, 2], [1], [1, 9], [63], [1, 32], [1, 2, 3], [1, 9, 4]]
    found = mask_of(walk, *paths)
    allowed = [[END], [1, 63, 64], None, [3, 4], [2, 32], None, [END], [3], [31], None]
    for path, row, tokens in zip(paths, found, allowed):
        assert (tokens is None and bool((row == -1).all())) or tokens_of(row) == tokens, path
    assert sorted(calls(walk, "step")) == sorted([1, 2, 3, 4, 9, 32, 63])
    assert len(calls(walk, "fill")) == 7 and walk.taken == []


def test_the_mask_of_the_text_is_read_once(walk):
    for _ in range(2):
        assert not walk.ended and walk.forced(4) == []
        mask_of(walk, [], [])
    assert calls(walk, "fill") == [0]
    walk.accept([1])
    assert tokens_of(mask_of(walk)[0]) == [2, 32] and calls(walk, "fill") == [0, 1]


def test_tokens_that_a_matcher_should_not_see_are_kept_from_it(walk):
    for path in ([END], [END, 1], [70], [SIZE], [-1], [10**9], [1, END]):
        assert bool((mask_of(walk, path) == -1).all())
    assert calls(walk, "step") == [1]


def test_forced_runs_end_where_there_is_a_choice_or_an_end(walk):
    walk.accept([1])
    assert walk.forced(5) == []
    walk.accept([2])
    assert walk.forced(5) == []
    walk.accept([3])
    assert walk.forced(5) == [31, 5, END] and walk.forced(2) == [31, 5] and walk.forced(0) == []
    assert walk.taken == [1, 2, 3]


def test_a_refused_run_leaves_the_walk_where_it_was(walk):
    for run in ([1, 2, 9], [1, 2, 3, END], [1, SIZE], [END]):
        with pytest.raises(ValueError, match=f"token {run[-1]} was emitted as number {len(run) - 1} "):
            walk.accept(run)
        assert walk.taken == [] and tokens_of(mask_of(walk)[0]) == [1, 63, 64] and not walk.ended
    walk.accept([64, 64, END, 5])
    assert walk.ended and walk.taken == [64, 64]


def test_a_failure_within_leaves_the_walk_where_it_was(walk, monkeypatch):
    def fail(mask):
        raise RuntimeError("too complex")

    walk.accept([1])
    before = mask_of(walk)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_fill", fail)
        with pytest.raises(RuntimeError, match="too complex"):
            mask_of(walk, [2, 3], [2])
        walk.accept([2, 3])
        with pytest.raises(RuntimeError, match="too complex"):
            walk.forced(3)
    assert walk.taken == [1, 2, 3] and tokens_of(mask_of(walk)[0]) == [31]
    assert not before.equal(mask_of(walk))


def test_an_end_of_the_vocabulary_alone(walk):
    assert tokens_of(torch.tensor([0, 1 << 30, -(1 << 31)], dtype=torch.int32)) == [62, 95]
    walk.accept([1, 2, 3])
    assert walk.forced(1) == [31], "the sign's bit"
    with pytest.raises(ValueError, match="end token 77 lies outside the vocabulary; allowed: 0 to 76"):
        ListedGuide(TEXTS, SIZE, [77])
