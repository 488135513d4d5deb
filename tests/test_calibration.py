from __future__ import annotations

from models import small_draft, small_target

from beagle_sd.calibration import Costs, choose_shape, measure_costs
from beagle_sd.generate import TreeShape

PLAIN, CHAIN, TREE = TreeShape(1, 1, 1), TreeShape(4, 1, 5), TreeShape(4, 4, 16)


def test_the_shape_that_pays_is_chosen():
    costs = Costs(verify={1: 10.0, 5: 12.0, 16: 20.0}, draft={CHAIN: 3.0, TREE: 4.0})
    assert choose_shape(costs, {CHAIN: 1.8, TREE: 2.2}) == CHAIN
    assert choose_shape(costs, {CHAIN: 1.8, TREE: 3.5}) == TREE
    assert costs.speedup(CHAIN, 1.8) == 1.8 * 10 / 15


def test_plain_decoding_where_nothing_pays():
    costs = Costs(verify={1: 10.0, 5: 20.0, 16: 40.0}, draft={CHAIN: 3.0, TREE: 4.0})
    assert choose_shape(costs, {CHAIN: 1.8, TREE: 2.2}) == PLAIN
    assert choose_shape(costs, {}) == PLAIN


def test_costs_are_measured_for_every_shape():
    target = small_target()
    costs = measure_costs(target, small_draft(target), [CHAIN, TREE], prefix=32)
    assert set(costs.verify) == {1, 5, 16} and set(costs.draft) == {CHAIN, TREE}
    assert all(value > 0 for value in [*costs.verify.values(), *costs.draft.values()])
