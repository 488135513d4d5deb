"""What a round costs: estimates between measured shapes, and the file that keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from models import small_draft, small_target

from beagle_sd.decoding.trees import calibration
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.calibration import calibrated_costs, measure_costs
from beagle_sd.decoding.trees.tree import PLAIN, TreeShape

CHAIN, TREE = TreeShape(4, 1, 5), TreeShape(4, 4, 16)
COSTS = Costs(verify={1: 10.0, 5: 12.0, 16: 20.0}, draft={CHAIN: 3.0, TREE: 4.0})


def test_measured_shapes_cost_what_was_measured():
    assert COSTS.round_ms(PLAIN) == 10.0 and COSTS.round_ms(CHAIN) == 15.0 and COSTS.round_ms(TREE) == 24.0
    assert COSTS.speedup(CHAIN, 1.8) == 1.8 * 10 / 15


@pytest.mark.parametrize(
    "shape,verify,draft",
    [
        (TreeShape(4, 1, 3), 11.0, 3.0),
        (TreeShape(2, 1, 3), 11.0, 1.5),
        (TreeShape(4, 4, 27), 28.0, 4.0),
        (TreeShape(7, 4, 16), 20.0, 4.0 + 12 / 9),
    ],
    ids=str,
)
def test_other_shapes_are_estimated_by_nodes_and_levels(shape, verify, draft):
    """4 levels of a chain compute 4 nodes of the draft, of a tree with branch 4 13, none none."""
    assert COSTS.round_ms(shape) == pytest.approx(verify + draft)


def test_costs_are_measured_for_every_shape():
    target = small_target()
    costs = measure_costs(target, small_draft(target), [CHAIN, TREE, PLAIN], prefix=32)
    assert set(costs.verify) == {1, 5, 16} and set(costs.draft) == {CHAIN, TREE}
    assert all(value > 0 for value in [*costs.verify.values(), *costs.draft.values()])


@pytest.fixture
def measured(monkeypatch):
    """calibrated_costs with a counter in place of the clock."""
    calls = []

    def fake(target, draft, shapes):
        calls.append(list(dict.fromkeys(shapes)))
        drafting = [shape for shape in calls[-1] if shape.num_nodes > 1]
        return Costs({1: 10.0, **{shape.num_nodes: 12.0 for shape in drafting}}, dict.fromkeys(drafting, 2.0))

    monkeypatch.setattr(calibration, "measure_costs", fake)
    return calls


def test_costs_are_measured_once(measured, tmp_path):
    target = small_target()
    draft = small_draft(target)
    first = calibrated_costs(target, draft, [CHAIN], folder=tmp_path / "new")
    assert calibrated_costs(small_target(), draft, [CHAIN, PLAIN], folder=tmp_path / "new") == first
    assert measured == [[CHAIN]]
    both = calibrated_costs(target, draft, [TREE], folder=tmp_path / "new")
    assert set(both.draft) == {CHAIN, TREE} and len(measured) == 2, "a missing shape is added to the file"
    calibrated_costs(target, draft, [TREE], anew=True, folder=tmp_path / "new")
    assert len(measured) == 3 and len(list((tmp_path / "new").iterdir())) == 1


def test_costs_of_a_busy_machine_are_not_kept(monkeypatch, tmp_path):
    found = [Costs(COSTS.verify, COSTS.draft, scatter=scatter) for scatter in (1.4, 2.5)]
    monkeypatch.setattr(calibration, "measure_costs", lambda *given: found.pop())
    target = small_target()
    draft = small_draft(target)
    with pytest.warns(UserWarning, match="busy: .* up to 2.5 times as long"):
        assert calibrated_costs(target, draft, [CHAIN], folder=tmp_path).scatter == 2.5
    assert not list(tmp_path.iterdir())
    calibrated_costs(target, draft, [CHAIN], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_scatter_is_of_the_passes(monkeypatch):
    """Rounds of 5 ms, in the second pass over all shapes of 10."""
    times = [5.0, 5.0, 10.0, 10.0, 5.0, 5.0]
    monkeypatch.setattr(calibration._Clock, "milliseconds", property(lambda clock: [times.pop(0)] * 3))
    target = small_target()
    costs = measure_costs(target, small_draft(target), [CHAIN], prefix=8)
    assert costs.scatter == 2.0 and costs.round_ms(PLAIN) == 5.0


@pytest.mark.parametrize("change", ["threads", "dtype", "target", "draft"])
def test_another_machine_or_model_has_costs_of_its_own(measured, tmp_path, change):
    target = small_target()
    draft = small_draft(target)
    calibrated_costs(target, draft, [CHAIN], folder=tmp_path)
    if change == "threads":
        torch.set_num_threads(2)
    elif change == "dtype":
        target.to(torch.bfloat16)
    elif change == "target":
        target = small_target(num_hidden_layers=3)
    else:
        draft = small_draft(target, draft_vocab=torch.arange(9))
    try:
        calibrated_costs(target, draft, [CHAIN], folder=tmp_path)
    finally:
        torch.set_num_threads(1)
    assert len(measured) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\0\xff",
        lambda text: text.replace("12.0", "-1.0"),
        lambda text: text.replace('"1":', '"one":'),
        lambda text: text.replace('"1":', '"2":'),
        lambda text: text.replace('"llama"', '"qwen2"'),
        lambda text: json.dumps({**json.loads(text), "draft_ms": [[4, 1, 0, 2.0]]}),
    ],
)
def test_a_damaged_file_is_written_anew(measured, tmp_path, harm):
    target = small_target()
    draft = small_draft(target)
    whole = calibrated_costs(target, draft, [CHAIN], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_text()
    path.write_text(harm(good))
    assert calibrated_costs(target, draft, [CHAIN], folder=tmp_path) == whole
    assert len(measured) == 2 and path.read_text() == good


def test_costs_that_cannot_be_kept_still_serve(measured, tmp_path):
    (tmp_path / "file").write_text("")
    target = small_target()
    with pytest.warns(UserWarning, match="could not be kept in .*file"):
        costs = calibrated_costs(target, small_draft(target), [CHAIN], folder=tmp_path / "file")
    assert costs.round_ms(CHAIN) == 14.0
