"""The one-pass simulation against a literal reading of the paper's figure 2."""

from __future__ import annotations

import pytest
import torch
from models import small_draft, small_target
from objective_cases import DTYPE, dense_attention, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from beagle_sd.training.objective import block_states, row_weights, rows_by_step, simulated_states


def literal_passes(draft, batch, window, offset) -> list[torch.Tensor]:
    """`window` passes over [true | draft] keys, 2T of them, with figure 2's dense mask; pass r reads pass r - 1.
    With window_keys no row sees further back."""
    sequence = batch.sequence
    own = offset.long()[sequence]
    place = batch.positions
    start = place - (place - own) % window
    same = sequence[:, None] == sequence
    inside = (place >= own)[:, None] & (place >= own)
    true_visible = same & (place < start[:, None]) & (place >= own)[:, None]
    draft_visible = same & inside & (place >= start[:, None]) & (place < place[:, None])
    if draft.config.window_keys is not None:
        near = place >= place[:, None] - draft.config.window_keys
        true_visible, draft_visible = true_visible & near, draft_visible & near
    embedded = draft.embed(batch.tokens)
    queries = draft.queries(embedded, place)
    keys, values = draft.keys_values(batch.states, place)
    passes = []
    for number in range(window):
        if number == 0 or not draft.config.append_states:
            attended = dense_attention(queries, keys, values, true_visible)
        else:
            more_keys, more_values = draft.keys_values(passes[-1], place)
            attended = dense_attention(
                queries,
                torch.cat((keys, more_keys)),
                torch.cat((values, more_values)),
                torch.cat((true_visible, draft_visible), 1),
            )
        passes.append(draft.block(embedded, attended))
    return passes


@pytest.mark.parametrize("append_states", [True, False])
@pytest.mark.parametrize(
    "window,window_keys,offsets",
    [
        (4, None, [0, 2, 1]),
        (3, None, [2, 0, 1]),
        (1, None, [0, 0, 0]),
        (5, None, [4, 3, 0]),
        (4, 4, [0, 2, 1]),
        (3, 10, [2, 0, 1]),
    ],
)
def test_simulation_equals_the_literal_passes(window, window_keys, offsets, append_states):
    settings = {"append_states": append_states, "window_keys": window_keys, "initializer_range": 0.2}
    draft = small_draft(small_target(), **settings).to(DTYPE)
    batch = make_batch([23, 3, 17])
    offset = torch.tensor(offsets, dtype=torch.int32)
    weight = row_weights(batch, window, offset, simulated=True).to(DTYPE)
    probe = torch.randn_like(batch.states)
    step = (batch.positions - offset.long()[batch.sequence]) % window
    counted = row_weights(batch, window, offset, simulated=False).to(DTYPE)
    assert torch.equal(weight, counted * (window - step)) and counted.sum() > 5

    states = simulated_states(draft, batch, batch.states, window, offset)
    (weight[:, None] * probe * states.pow(2)).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    loss = 0.0
    passes = literal_passes(draft, batch, window, offset)
    for number, literal in enumerate(passes):
        loss = loss + ((counted * (step <= number))[:, None] * probe * literal.pow(2)).sum()
    loss.backward()

    rows = counted > 0
    torch.testing.assert_close(states[rows], passes[-1][rows], rtol=1e-10, atol=1e-10)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window_keys", [None, 7])
def test_stage_one_is_the_first_pass(window_keys):
    draft = small_draft(small_target(), initializer_range=0.2, window_keys=window_keys).to(DTYPE)
    batch, offset = make_batch([20, 9]), torch.tensor([3, 1], dtype=torch.int32)
    states = block_states(draft, batch, batch.states, 5, offset)
    rows = row_weights(batch, 5, offset, simulated=False) > 0
    torch.testing.assert_close(states[rows], literal_passes(draft, batch, 5, offset)[0][rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("states_of", [block_states, simulated_states])
def test_window_keys_beyond_the_text_change_nothing(states_of):
    batch, offset = make_batch([20, 9]), torch.tensor([3, 1], dtype=torch.int32)
    found = [
        states_of(small_draft(small_target(), window_keys=most).to(DTYPE), batch, batch.states, 4, offset)
        for most in (None, 20, 8)
    ]
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


def test_more_steps_than_window_keys_are_refused():
    draft, batch = small_draft(small_target(), window_keys=3).to(DTYPE), make_batch([20])
    with pytest.raises(ValueError, match="4 steps of simulation; allowed: up to the draft's window_keys, 3"):
        simulated_states(draft, batch, batch.states, 4, torch.zeros(1, dtype=torch.int32))


def test_a_piece_of_a_text_teaches_what_the_text_does():
    """With the states within window_keys and steps - 1 positions before the first row to learn, for every offset."""
    draft = small_draft(small_target(), initializer_range=0.2, window_keys=6).to(DTYPE)
    whole, first, steps = make_batch([40]), 25, 4
    whole = whole._replace(loss_mask=torch.arange(40) >= first)
    start = first - 6 - (steps - 1)
    piece = make_batch([40 - start])._replace(
        tokens=whole.tokens[start:], states=whole.states[start:], loss_mask=whole.loss_mask[start:]
    )
    for offset in range(steps):
        want, got = (
            simulated_states(draft, batch, batch.states, steps, torch.tensor([begin], dtype=torch.int32))
            for batch, begin in ((whole, offset), (piece, (offset - start) % steps))
        )
        # its positions begin anew, and RoPE's angles are in fp32; without the states of a step before it is off by 0.1
        torch.testing.assert_close(got[first - start :], want[first:], rtol=0, atol=1e-4)


def test_detached_states_change_gradients_but_not_values():
    draft = small_draft(small_target(), initializer_range=0.2).to(DTYPE)
    batch, offset = make_batch([20]), torch.tensor([1], dtype=torch.int32)
    gradients = []
    for detach in (False, True):
        draft.zero_grad()
        states = simulated_states(draft, batch, batch.states, 4, offset, detach_states=detach)
        states.pow(3).sum().backward()
        gradients.append((states.detach().clone(), draft.down_proj.weight.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_rows_that_carry_no_loss():
    batch = make_batch([12])._replace(loss_mask=torch.ones(12, dtype=torch.bool))
    at = lambda offset, window: row_weights(batch, window, torch.tensor([offset], dtype=torch.int32), simulated=False)  # noqa: E731
    assert at(0, 4).tolist() == [0] * 4 + [1] * 8, "the window at position 0 has no true key"
    assert at(3, 4).tolist() == [0] * 3 + [1] * 9, "rows before the first window see nothing"


def test_sequences_shorter_than_a_window():
    draft = small_draft(small_target()).to(DTYPE)
    batch, offset = make_batch([2, 1, 9]), torch.tensor([3, 1, 2], dtype=torch.int32)
    states = simulated_states(draft, batch, batch.states, 4, offset)
    assert states.isfinite().all()
    weights = row_weights(batch, 4, offset, simulated=True)
    assert weights[:3].eq(0).all()


def test_no_window_at_all():
    """Every sequence shorter than its offset: zeros, and a backward pass that gives zeros."""
    draft = small_draft(small_target()).to(DTYPE)
    batch, offset = make_batch([2, 1]), torch.tensor([3, 1], dtype=torch.int32)
    states = simulated_states(draft, batch, batch.states, 4, offset)
    assert states.shape == (3, 64) and states.eq(0).all()
    states.sum().backward()
    assert all(parameter.grad is None or parameter.grad.eq(0).all() for parameter in draft.parameters())


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device, and the lookups whose backward sorts."""

    def __init__(self):
        super().__init__()
        self.counts = {"read": 0, "index": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        sizeless = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        self.counts["read"] += name in ("_local_scalar_dense", "nonzero", "masked_select") or sizeless
        self.counts["index"] += name in ("index", "index_put", "index_put_", "_index_put_impl_")
        return function(*args, **(kwargs or {}))


def literal_rows(batch, window, offset) -> list[list[int]]:
    """Step by step, in Python."""
    windows = []
    for first, end, own in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), offset.tolist()):
        windows += [(start, min(window, end - start)) for start in range(first + own, end, window)]
    windows = [(start, reach) for start, reach in windows if batch.loss_mask[start : start + reach].any()]
    windows.sort(key=lambda one: -one[1])
    return [[start + step for start, reach in windows if reach > step] for step in range(window)]


@pytest.mark.parametrize("window", [1, 4, 7])
def test_rows_by_step_reads_the_device_once(window, monkeypatch):
    read, lists = torch.Tensor.tolist, []
    for lengths, offsets in (([23, 3, 17, 4], [2, 3, 0, 0]), ([2, 1], [3, 1]), ([8], [1])):
        batch, offset = make_batch(lengths), torch.tensor(offsets, dtype=torch.int32)
        with Reads() as reads, monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or read(self))
            rows = rows_by_step(batch, window, offset)
        assert [row.tolist() for row in rows] == literal_rows(batch, window, offset)
        assert reads.counts == {"read": 0, "index": 0} and lists.pop() == (window,) and not lists


def test_a_pass_looks_rows_up_without_sorting():
    """Forward and backward; of reads there are those of rows_by_step alone."""
    draft, batch = small_draft(small_target()).to(DTYPE), make_batch([23, 3, 17])
    offset = torch.tensor([2, 3, 0], dtype=torch.int32)
    with Reads() as reads:
        row_weights(batch, 4, offset, simulated=True)
    assert reads.counts == {"read": 0, "index": 0}
    with Reads() as reads:
        simulated_states(draft, batch, batch.states, 4, offset).sum().backward()
    assert reads.counts["index"] == 0


def test_index_select_changes_no_bit(monkeypatch):
    """States and gradients are those of plain indexing."""
    draft, batch = small_draft(small_target(), initializer_range=0.2), make_batch([23, 3, 17])
    offset, results = torch.tensor([2, 3, 0], dtype=torch.int32), []
    batch = batch._replace(states=batch.states.float())
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(torch.Tensor, "index_select", lambda self, dim, rows: self[rows])
        draft.zero_grad()
        states = simulated_states(draft, batch, batch.states, 4, offset)
        states.pow(3).sum().backward()
        results.append([states.detach(), *(p.grad.clone() for p in draft.parameters() if p.grad is not None)])
    assert len(results[0]) > 5 and all(map(torch.equal, *results))
