"""Where training starts: recent states pass through the block, and training from there does better."""

from __future__ import annotations

import forks
import pytest
import torch
from accelerate import PartialState
from models import small_target

from beagle_sd.data.batch import Batch
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.objective import block_states
from beagle_sd.training.parallel import same_everywhere
from beagle_sd.training.start import passing_start


def started(key_value_heads: int, **overrides) -> tuple[BeagleDraft, torch.Tensor, torch.Tensor]:
    """A small draft, with tokens [256] and states [256, d] that share a mean, as real ones do."""
    torch.manual_seed(0)
    target = small_target()
    draft = BeagleDraft.from_target(target, num_key_value_heads=key_value_heads, **overrides)
    tokens = torch.randint(target.config.vocab_size, (256,))
    states = torch.randn(256, target.config.hidden_size) + 0.5
    return passing_start(draft, tokens, states), tokens, states


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_the_block_gives_back_what_its_values_carry(key_value_heads):
    """W_O W_V is twice a projection (to 1/20, for what is left of the random W_O): onto all of d with a key head for
    every query head, else onto as many dimensions as the values have."""
    draft, _, _ = started(key_value_heads)
    sharing = draft.config.num_attention_heads // key_value_heads
    values = draft.v_proj.weight.view(key_value_heads, draft.config.head_dim, -1).repeat_interleave(sharing, 0)
    passed = draft.o_proj.weight @ values.flatten(0, 1) / 2
    rank = key_value_heads * draft.config.head_dim
    assert torch.trace(passed).item() == pytest.approx(rank, rel=0.05)
    torch.testing.assert_close(passed @ passed, passed, rtol=0.0, atol=0.05)


def test_fewer_key_heads_carry_the_main_directions():
    torch.manual_seed(0)
    target = small_target()
    draft = BeagleDraft.from_target(target, num_key_value_heads=1)
    width, size = target.config.hidden_size, draft.config.head_dim
    plane = torch.linalg.qr(torch.randn(width, size))[0]
    states = torch.randn(256, size) @ plane.T + 0.01 * torch.randn(256, width)
    passing_start(draft, torch.zeros(256, dtype=torch.int64), states)
    inside = (draft.v_proj.weight @ plane).square().sum() / draft.v_proj.weight.square().sum()
    assert inside > 0.99


@pytest.mark.parametrize("norms", [True, False])
def test_nearer_states_weigh_more(norms):
    """The mean query's weight on mean states falls with distance: the last gets twice what one 16 before it gets."""
    draft, tokens, states = started(4, norm_query=norms, norm_state=norms)
    embedded = draft.embed(tokens).mean(0) if not norms else draft.norm_query(draft.embed(tokens)).mean(0)
    keys = states.mean(0) if not norms else draft.norm_state(states).mean(0)
    positions = torch.arange(64)
    query = draft._rotate(draft.q_proj(embedded)[None], torch.tensor([64]))[0]
    key = draft._rotate(draft.k_proj(keys).expand(64, -1), positions)
    scores = torch.einsum("hd,thd->ht", query, key) / draft.config.head_dim**0.5
    weights = scores.softmax(-1).mean(0)
    assert weights[-1] > 2 * weights[-17] > 0
    assert scores[:, -1].mean().item() == pytest.approx(4.0, abs=1.0)


def test_training_from_here_loses_less():
    """The same steps from the random start leave a larger loss, on states that repeat the one before them."""
    losses = {}
    for passing in (True, False):
        torch.manual_seed(0)
        target = small_target()
        draft = BeagleDraft.from_target(target, num_key_value_heads=4)
        states = torch.randn(8, target.config.hidden_size).repeat_interleave(32, 0)
        tokens = torch.randint(target.config.vocab_size, (256,))
        batch = Batch(
            tokens,
            states,
            torch.ones(256, dtype=torch.bool),
            torch.arange(0, 257, 32, dtype=torch.int32),
            torch.arange(256) % 32,
        )
        if passing:
            passing_start(draft, tokens, states)
        optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3)
        for _ in range(20):
            found = block_states(draft, batch, states, 1, torch.zeros(8, dtype=torch.int32))
            loss = (found - states)[batch.positions > 0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[passing] = loss.item()
    assert losses[True] < 0.8 * losses[False]


def test_every_process_starts_as_the_main_one():
    def work():
        processes = PartialState(cpu=True)
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(layer.weight, float(processes.process_index + 1))
        same_everywhere(layer.parameters())
        assert processes.num_processes == 2 and (layer.weight == 1.0).all()

    assert forks.run_ranks(2, work) == [0, 0]


def test_what_is_wrong_is_named():
    draft = BeagleDraft.from_target(small_target())
    width = draft.config.hidden_size
    for tokens, states in [
        (torch.zeros(0), torch.zeros(0, width)),
        (torch.zeros(3), torch.zeros(2, width)),
        (torch.zeros(2), torch.zeros(2, width + 1)),
    ]:
        with pytest.raises(ValueError, match=rf"allowed: \[n\] and \[n, {width}\]"):
            passing_start(draft, tokens.long(), states)
    with pytest.raises(ValueError, match="num_key_value_heads is 3; allowed: divisors of the 4 query heads"):
        BeagleDraft.from_target(small_target(), num_key_value_heads=3)
