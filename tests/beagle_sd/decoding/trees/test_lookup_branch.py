"""Branches copied from the text: the same text, in fewer rounds where it repeats, and what they bring is learnt."""

from __future__ import annotations

import math

import pytest
import torch
from decoding_cases import prompts
from models import agreeable_target, small_draft
from round_cases import PATHS, fixed_engine, rows

from beagle_sd import AdaptiveTree, TreeShape, generate
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.lookup import LONGEST, USUAL, Copied, Lookup
from beagle_sd.decoding.trees.tree import PLAIN

WITH, WITHOUT = TreeShape(3, 2, 12, 10), TreeShape(3, 2, 12)


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tree", [WITH, TreeShape(1, 1, 20, 19), TreeShape(6, 3, 9, 2)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 5, "seed": 4}], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding(pair, path, tree, settings):
    target, draft = pair
    ids, mask = rows(4)
    want = generate(target, None, ids, mask, max_new_tokens=40, **settings)
    engine = fixed_engine(target, draft, 4, 51, tree=tree, **PATHS[path])
    for _ in range(2):
        made = generate(target, draft, ids, mask, max_new_tokens=40, engine=engine, **settings)
        assert torch.equal(made.sequences, want.sequences)


def test_a_text_that_repeats_takes_fewer_rounds(pair):
    """The small target falls into a loop, which its draft does not know."""
    target, draft = pair
    found = {tree: generate(target, draft, prompts(1), max_new_tokens=100, tree=tree) for tree in (WITH, WITHOUT)}
    assert torch.equal(found[WITH].sequences, found[WITHOUT].sequences)
    assert found[WITH].report.tokens_per_round > 1.15 * found[WITHOUT].report.tokens_per_round
    assert len(found[WITH].report.acceptance_by_depth) > 3, "deeper than the draft drafts"


def test_a_branch_has_the_chances_of_its_match():
    device = torch.device("cpu")
    lookup = Lookup(3, 4, device)
    text = torch.tensor([[1, 2, 3, 9, 1, 2, 3], [5, 6, 7, 8, 1, 2, 3], [4, 4, 4, 4, 4, 4, 4]])
    lookup.find(text, torch.tensor([7, 7, 3]))
    assert lookup.tokens.tolist() == [[9, 1, 2, 3], [-1] * 4, [4, 4, 4, 4]] and lookup.matched.tolist() == [3, 0, 2]
    tokens, scores = lookup.branch(3)
    assert tokens.tolist() == [[9, 1, 2], [-1] * 3, [4, 4, 4]]
    want = torch.tensor([math.log(USUAL[3]), math.log(USUAL[4]), math.log(USUAL[5])]).cumsum(0)
    torch.testing.assert_close(scores[0], want)
    assert lookup.agreed(torch.tensor([[9, 1, 5], [1, 2, 3], [4, 5, 4]])).tolist() == [2, 0, 1]


def test_what_matches_bring_is_learnt_by_their_length():
    copied = Copied()
    assert [copied.chance(length) for length in (0, 3, 99)] == pytest.approx([0.0, USUAL[3], USUAL[LONGEST]])
    for _ in range(200):
        copied.learn(2, 0, 1, 8)  # never goes on
        copied.learn(6, 8, 9, 8)  # always does
    assert copied.chance(2) < 0.05 and copied.chance(7) > 0.95 and copied.chance(1) == pytest.approx(USUAL[1])
    assert copied.expected(2, 8) < 0.1 and copied.expected(6, 8) > 7.0 and copied.expected(0, 8) == 0.0
    assert copied.gains()[2] < -3.0 < copied.gains()[7] <= 0.0
    before = copied.chance(4)
    copied.learn(4, 2, 2, 8)  # cut by the text's end behind two: nothing is known of a third
    assert copied.chance(4) > before and copied.chance(6) > 0.9


def test_the_adaptive_tree_takes_a_branch_where_the_text_repeats():
    shapes = {TreeShape(2, 1, 3): 1.6, TreeShape(2, 1, 12, 11): 1.65}
    costs = Costs({1: 1.0, 3: 1.3, 12: 2.0}, dict.fromkeys(shapes, 0.1))
    tree = AdaptiveTree(costs, shapes, clock=lambda: 0.0)
    assert tree.largest == TreeShape(2, 1, 12, 11) and tree.shapes[0] == PLAIN
    assert tree.choose([0]) == TreeShape(2, 1, 3), "the small tree pays better without a match"
    assert tree.choose([LONGEST]) == TreeShape(2, 1, 12, 11)
    for _ in range(100):
        tree.learn_lookup([(LONGEST, 0, 1)], 11)
    assert tree.choose([LONGEST]) == TreeShape(2, 1, 3), "in this text matches do not go on"
    assert tree.again().choose([LONGEST]) == TreeShape(2, 1, 12, 11)


def test_without_a_match_a_branch_brings_what_the_tree_brings_without_it():
    small, large = TreeShape(2, 1, 3), TreeShape(4, 4, 12)
    shapes = {small: 1.6, large: 2.0, TreeShape(4, 4, 12, 11): 4.0}
    tree = AdaptiveTree(Costs({1: 1.0, 3: 1.1, 12: 1.9}, dict.fromkeys(shapes, 0.1)), shapes, clock=lambda: 0.0)
    assert tree.choose([0]) == small and tree.choose([9]) == TreeShape(4, 4, 12, 11)


def test_an_adaptive_tree_learns_in_a_text(pair):
    target, draft = pair
    shapes = {WITHOUT: 1.5, WITH: 1.6}
    tree = AdaptiveTree(Costs({1: 1.0, 12: 1.2}, dict.fromkeys(shapes, 0.1)), shapes, probe=2)
    engine = fixed_engine(target, draft, 1, 80, tree=tree)
    made = generate(target, draft, prompts(1), max_new_tokens=60, engine=engine)
    assert torch.equal(made.sequences, generate(target, None, prompts(1), max_new_tokens=60).sequences)
    assert tree.copied.seen != Copied().seen
    torch.testing.assert_close(engine.buffers.lookup.gains, torch.tensor(tree.copied.gains()))
