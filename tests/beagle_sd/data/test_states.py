"""The target's states: of many sequences at once they are those of each alone, in groups that are always the same."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, small_target

from beagle_sd.data import states
from beagle_sd.data.states import target_states
from beagle_sd.models.target import Target

LENGTHS = [3, 17, 1, 9, 17, 2, 30, 4]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("room", [1, 40, 4096])
def test_states_are_those_of_each_sequence_alone(room, monkeypatch):
    monkeypatch.setitem(states._FORWARD_TOKENS, "cpu", room)
    model, given = small_target(), sequences()
    target, groups = Target(model), []
    for which, found in target_states(target, given):
        assert found.dtype == torch.bfloat16 and len(which) * max(LENGTHS[index] for index in which) <= max(room, 30)
        groups.append(which)
        for index, part in zip(which, found.split([LENGTHS[index] for index in which]), strict=True):
            with torch.no_grad():
                alone = model.model(given[index][None]).last_hidden_state[0]
            torch.testing.assert_close(part.float(), alone, rtol=1e-2, atol=1e-2)
    assert sorted(sum(groups, [])) == list(range(len(LENGTHS)))
    assert len(groups) == {1: 8, 40: 4, 4096: 1}[room]


def test_the_same_sequences_give_the_same_bits():
    target = Target(small_target())
    first, again = (list(target_states(target, sequences())) for _ in range(2))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))


def test_no_sequence_no_forward():
    assert list(target_states(Target(small_target()), [])) == []
