"""The adaptive tree: it follows what the text accepts, and never changes the text."""

from __future__ import annotations

import json

import pytest
import torch
from models import agreeable_target, small_draft, small_target
from test_generate import NEW, prompts, ragged

from beagle_sd import AdaptiveTree, BeagleDraft, adaptive_tree, calibration, generate
from beagle_sd.bundled import bundled_folder, measured_acceptance
from beagle_sd.calibration import PLAIN, Costs
from beagle_sd.generate import TreeShape

CHAIN, TREE = TreeShape(2, 1, 3), TreeShape(4, 4, 16)
MEASURED = {CHAIN: 1.5, TREE: 2.0}
CHEAP = Costs({1: 10.0, 3: 11.0, 16: 30.0}, {CHAIN: 1.0, TREE: 2.0})
"""The chain pays from 1.2 tokens a round, the tree from 3.2."""


def test_it_starts_with_what_usually_pays():
    assert AdaptiveTree(CHEAP, MEASURED).choose() == CHAIN
    assert AdaptiveTree(Costs({1: 10.0, 3: 20.0, 16: 30.0}, CHEAP.draft), MEASURED).choose() == PLAIN


def test_it_gives_up_where_nothing_is_accepted_and_comes_back():
    tree, played = AdaptiveTree(CHEAP, MEASURED, memory=8, probe=10), []
    for _ in range(100):
        played.append(tree.choose())
        tree.learn(played[-1], 0.0)
    assert played[0] == CHAIN and played[30:].count(PLAIN) >= 60, "drafting went on for nothing"
    assert CHAIN in played[50:], "it never tried again"
    for _ in range(200):
        tree.learn(shape := tree.choose(), 2.0 if shape.num_nodes > 1 else 0.0)
    assert tree.choose() != PLAIN


def test_a_text_that_accepts_everything_gets_the_larger_tree():
    costs = Costs({1: 10.0, 3: 11.0, 16: 13.0}, CHEAP.draft)
    tree = AdaptiveTree(costs, {CHAIN: 1.5, TREE: 1.8})
    assert tree.choose() == CHAIN
    for _ in range(60):
        tree.learn(tree.choose(), 2.0)
    assert tree.choose() == TREE


@pytest.mark.parametrize("make", [small_target, agreeable_target])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_plain_decoding(make, temperature):
    target = make()
    ids, mask = ragged("left")
    # costs so close that all shapes and plain decoding take turns
    tree = AdaptiveTree(Costs({1: 10.0, 3: 11.0, 16: 12.0}, {CHAIN: 0.5, TREE: 0.6}), MEASURED, memory=2, probe=3)
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 5}
    want = generate(target, None, ids, mask, **settings)
    made = generate(target, small_draft(target), ids, mask, adaptive=tree, **settings)
    assert torch.equal(made.sequences, want.sequences)
    assert all(0.0 <= share <= 1.0 for share in made.report.acceptance_by_depth)


def test_a_gain_within_the_costs_error_is_not_taken():
    costs = Costs({1: 10.0, 3: 13.0}, {CHAIN: 1.0})
    assert AdaptiveTree(costs, {CHAIN: 1.42}).choose() == PLAIN
    assert AdaptiveTree(costs, {CHAIN: 1.42}, margin=1.0).choose() == CHAIN
    assert not AdaptiveTree(costs, {CHAIN: 1.42}).pays and AdaptiveTree(costs, {CHAIN: 1.5}).pays


def test_another_text_starts_anew():
    tree = AdaptiveTree(CHEAP, MEASURED, memory=5, probe=7, margin=1.2)
    tree.learn(CHAIN, 2.0)
    again = tree.again()
    assert again.accepted == again.expected and tree.accepted != tree.expected
    assert (again.memory, again.probe, again.margin) == (5, 7, 1.2)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty cache folder, and short passes."""
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_PASSES", 1)
    return tmp_path


def test_a_measured_draft_brings_its_own_acceptance(kept):
    target = small_target()
    small_draft(target).save_pretrained(kept / "draft")
    draft = BeagleDraft.from_pretrained(kept / "draft").bind(target)
    usual = adaptive_tree(target, draft)
    rows = measured_acceptance(bundled_folder("smollm2-135m"))
    assert len(usual.measured) == sum(row["temperature"] == 0.0 for row in rows), "the bundled draft's, as a guess"
    row = {"depth": 2, "branch": 1, "num_nodes": 3, "temperature": 0.0, "tokens_per_round": 1.4}
    (kept / "draft" / "acceptance.json").write_text(json.dumps({"shapes": [row, {**row, "temperature": 1.0}]}))
    tree = adaptive_tree(target, draft)
    assert tree.measured == {CHAIN: 1.4} and tree.largest == CHAIN
    assert tree.costs == usual.costs, "the costs were kept"
    assert generate(target, draft, prompts(1), max_new_tokens=8, adaptive=tree).report.new_tokens == 8
    assert adaptive_tree(target, draft, measured=MEASURED).measured == MEASURED


def test_bad_settings_are_named():
    target = small_target()
    with pytest.raises(ValueError, match="no shape is measured.*allowed"):
        AdaptiveTree(CHEAP, {})
    for name, value in (("memory", 0), ("probe", 1), ("margin", 0.9)):
        with pytest.raises(ValueError, match=f"{name} (is )?{value}.*allowed"):
            AdaptiveTree(CHEAP, MEASURED, **{name: value})
    with pytest.raises(ValueError, match="num_nodes 9 .*adaptive.*allowed"):
        generate(target, small_draft(target), prompts(1), num_nodes=9, adaptive=AdaptiveTree(CHEAP, MEASURED))
