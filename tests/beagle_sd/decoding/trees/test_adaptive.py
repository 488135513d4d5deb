"""The adaptive tree: it follows what the text accepts, and never changes the text."""

from __future__ import annotations

import json

import pytest
import torch
from decoding_cases import NEW, prompts, ragged
from models import agreeable_target, small_draft, small_target

from beagle_sd import AdaptiveTree, BeagleDraft, adaptive_tree, generate
from beagle_sd.decoding.trees import calibration
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import PLAIN, TreeShape
from beagle_sd.models.loading import bundled_folder, measured_acceptance

CHAIN, TREE = TreeShape(2, 1, 3), TreeShape(4, 4, 16)
MEASURED = {CHAIN: 1.5, TREE: 2.0}
CHEAP = Costs({1: 10.0, 3: 11.0, 16: 30.0}, {CHAIN: 1.0, TREE: 2.0})
"""The chain pays from 1.2 tokens a round, the tree from 3.2."""


class Machine:
    """A clock that a round's cost moves on, times `slow` of its kind; as calibrated without it."""

    def __init__(self, costs, measured, **settings):
        self.now, self.slow, self.costs = 0.0, {True: 1.0, False: 1.0}, costs
        self.tree = AdaptiveTree(costs, measured, clock=lambda: self.now, **settings)

    def play(self, rounds, accepted):
        """The shapes of so many rounds; a drafted one accepts `accepted`."""
        shapes = []
        for _ in range(rounds):
            shapes.append(shape := self.tree.choose())
            drafts = shape.num_nodes > 1
            self.now += 1e-3 * self.costs.round_ms(shape) * self.slow[drafts]
            self.tree.learn(shape, accepted if drafts else 0.0)
        return shapes


def test_it_starts_with_what_usually_pays():
    assert AdaptiveTree(CHEAP, MEASURED).choose() == CHAIN
    assert AdaptiveTree(Costs({1: 10.0, 3: 20.0, 16: 30.0}, CHEAP.draft), MEASURED).choose() == PLAIN


def test_it_gives_up_where_nothing_is_accepted_and_comes_back():
    machine = Machine(CHEAP, MEASURED, memory=8, probe=10)
    played = machine.play(100, 0.0)
    assert played[0] == CHAIN and played[30:].count(PLAIN) >= 60, "drafting went on for nothing"
    assert CHAIN in played[50:], "it never tried again"
    assert machine.play(200, 2.0)[-20:].count(PLAIN) <= 2


def test_a_text_that_accepts_everything_gets_the_larger_tree():
    machine = Machine(Costs({1: 10.0, 3: 11.0, 16: 13.0}, CHEAP.draft), {CHAIN: 1.5, TREE: 1.8})
    played = machine.play(60, 2.0)
    assert played[0] == CHAIN and played[-1] == TREE


def test_costs_that_were_measured_wrong_are_mended():
    """Drafting costs twice what calibration says: 1.5 tokens for 2.4 plain rounds do not pay. And back."""
    machine = Machine(CHEAP, MEASURED)
    machine.slow[True] = 2.0
    played = machine.play(200, 0.5)
    assert played[0] == CHAIN and played[30:].count(PLAIN) > 160
    machine.slow[True] = 1.0
    assert machine.play(400, 0.5)[-40:].count(CHAIN) > 35


def test_a_machine_that_is_slower_at_everything_changes_nothing_for_long():
    machine = Machine(CHEAP, MEASURED)
    machine.play(60, 0.5)
    machine.slow = {True: 3.0, False: 3.0}
    assert machine.play(120, 0.5)[-60:].count(PLAIN) <= 10, "plain decoding is as slow"


@pytest.mark.parametrize("make", [small_target, agreeable_target])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_plain_decoding(make, temperature):
    target = make()
    ids, mask = ragged("left")
    # costs so close that all shapes and plain decoding take turns
    tree = AdaptiveTree(Costs({1: 10.0, 3: 11.0, 16: 12.0}, {CHAIN: 0.5, TREE: 0.6}), MEASURED, memory=2, probe=3)
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 5}
    want = generate(target, None, ids, mask, **settings)
    made = generate(target, small_draft(target), ids, mask, tree=tree, **settings)
    assert torch.equal(made.sequences, want.sequences)
    assert all(0.0 <= share <= 1.0 for share in made.report.acceptance_by_depth)


def test_another_text_starts_anew():
    tree = AdaptiveTree(CHEAP, MEASURED, memory=5, probe=7)
    tree.learn(CHAIN, 2.0)
    again = tree.again()
    assert again.accepted == again.expected and tree.accepted != tree.expected
    assert (again.memory, again.probe) == (5, 7)


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
    assert generate(target, draft, prompts(1), max_new_tokens=8, tree=tree).report.new_tokens == 8
    assert adaptive_tree(target, draft, measured=MEASURED).measured == MEASURED


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="no shape is measured.*allowed"):
        AdaptiveTree(CHEAP, {})
    for name, value in (("memory", 0), ("probe", 1)):
        with pytest.raises(ValueError, match=f"{name} (is )?{value}.*allowed"):
            AdaptiveTree(CHEAP, MEASURED, **{name: value})
