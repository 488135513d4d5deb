"""EAGLE-2's head, the peer: it is what its equations say, learns from the same trainer, and drafts as it should."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from models import agreeable_target, small_draft, small_target
from objective_cases import dense_attention, make_batch
from shard_cases import write_states
from training_cases import CONFIG, Stop, metrics_of

from beagle_kernels import Sampling
from beagle_sd.data.dataset import StateDataset
from beagle_sd.decoding.drafting import DraftCache
from beagle_sd.training.trainer import Trainer
from bench.peers.eagle2 import EagleDraft, eagle_states, propose, states_before

ONE_STEP = replace(CONFIG, window=1, block_epochs=4.0, simulation_epochs=0.0)


def eagle_draft(target, seed: int = 1, **overrides) -> EagleDraft:
    torch.manual_seed(seed)
    return EagleDraft.from_target(target, **overrides)


def one_step(draft, batch, keys_of):
    offset = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.int32)
    return eagle_states(draft, batch, keys_of, 1, offset, simulated=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_states(tmp_path_factory.mktemp("states"), small_target())


def trainer_of(data, folder, config=ONE_STEP) -> Trainer:
    dataset = StateDataset(data, held_out=config.held_out)
    return Trainer(eagle_draft(small_target()), dataset, folder, config, states=eagle_states)


def test_one_step_is_causal_attention_over_the_pairs():
    draft = eagle_draft(small_target(), initializer_range=0.2).double()
    batch = make_batch([9, 1, 14])
    x = draft.fc(torch.cat((draft.embed(batch.tokens), states_before(batch.states, torch.tensor([0, 9, 10]))), -1))
    assert states_before(batch.states, torch.tensor([0, 9, 10]))[[0, 9, 10]].eq(0).all()
    keys, values = draft.keys_values(x, batch.positions)
    visible = (batch.sequence[:, None] == batch.sequence) & (batch.positions[:, None] >= batch.positions)
    attended = dense_attention(draft.queries(x, batch.positions), keys, values, visible)
    want = draft.block(x, attended)
    torch.testing.assert_close(one_step(draft, batch, batch.states), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window, offsets", [(4, [0, 2, 1]), (1, [0, 0, 0]), (6, [5, 0, 3])])
def test_simulation_recomputed_in_full(window, offsets):
    """A window's states, one after the other, each time with those before it in the target's place."""
    draft = eagle_draft(small_target(), initializer_range=0.2).double()
    batch, offset = make_batch([13, 2, 15]), torch.tensor(offsets, dtype=torch.int32)
    with torch.no_grad():
        got = eagle_states(draft, batch, batch.states, window, offset, simulated=True)
        for first, length, begin in zip((0, 13, 15), (13, 2, 15), offsets):
            assert got[first : first + begin].eq(0).all()
            for start in range(first + begin, first + length, window):
                known, end = batch.states.clone(), min(start + window, first + length)
                if not batch.loss_mask[start:end].any():  # nothing to learn, and so not computed
                    assert got[start:end].eq(0).all()
                    continue
                for row in range(start, end):
                    known[row] = one_step(draft, batch, known)[row]
                    torch.testing.assert_close(got[row], known[row], rtol=1e-10, atol=1e-10)


def test_the_loss_falls_and_a_stopped_run_resumes(data, tmp_path):
    whole = trainer_of(data, tmp_path / "whole")
    whole.run()
    lines = metrics_of(tmp_path / "whole")
    assert sum(line["loss"] for line in lines[-3:]) / 3 < 0.9 * lines[0]["loss"]
    assert len(lines[-1]["acceptance_by_depth"]) == 6

    def interrupt(step, metrics):
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        trainer_of(data, tmp_path / "again").run(interrupt)
    resumed = trainer_of(data, tmp_path / "again")
    assert resumed.step == 4
    resumed.run()
    assert metrics_of(tmp_path / "again") == lines
    again = EagleDraft.from_pretrained(tmp_path / "again" / "final").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in whole.draft.state_dict().items())


@pytest.mark.parametrize("vocab", [None, torch.arange(0, 97, 2)], ids=["all", "reduced"])
def test_drafting_recomputed_in_full(vocab):
    """Every candidate's score is that of its path alone, run in full over true states and the path's own."""
    target = agreeable_target()
    draft = eagle_draft(target, draft_vocab=vocab, initializer_range=0.2).double()
    draft.head.double()
    batch = make_batch([12, 12])
    lengths = torch.tensor([9, 5], dtype=torch.int32)
    tokens, states = batch.tokens.view(2, 12), batch.states.view(2, 12, -1)
    x = draft.pooled(draft.embed(batch.tokens), states_before(batch.states, torch.tensor([0, 12]))).view(2, 12, -1)
    rows = torch.arange(2)
    depth, branch = 3, 2
    cache = DraftCache(draft, 2, 12, depth, branch)
    cache.begin(draft, x, lengths)
    root, before = tokens[rows, lengths.long()], states[rows, lengths.long() - 1]
    found = propose(draft, cache, lengths, root, before, Sampling.of(2), depth, branch)
    assert found.tokens.shape == (2, branch + 2 * branch**2)
    for row in range(2):
        for number in range(found.tokens.shape[1]):
            path, at = [], number
            while at >= 0:
                path.insert(0, int(found.tokens[row, at]))
                at = int(found.parents[row, at])
            want = score_of(draft, tokens[row, : lengths[row] + 1], states[row, : lengths[row]], path)
            torch.testing.assert_close(found.scores[row, number].double(), want, rtol=1e-4, atol=1e-4)


def score_of(draft, tokens, states, path):
    """The log-probability of a path below the last of `tokens`, by plain passes over everything."""
    score = 0.0
    for token in path:
        alone = make_batch([len(tokens)])._replace(tokens=tokens)
        state = one_step(draft, alone, torch.cat((states, states[:1])))[-1]
        states, tokens = torch.cat((states, state[None])), torch.cat((tokens, torch.tensor([token])))
        logits = torch.log_softmax(draft.logits(state).double(), -1)
        at = token if draft.draft_vocab is None else int((draft.draft_vocab == token).nonzero())
        score = score + logits[at]
    return score


def test_a_folder_of_one_kind_is_refused_by_the_other(data, tmp_path):
    trainer_of(data, tmp_path).save()
    with pytest.raises(ValueError, match="model_type eagle2 -> beagle"):
        Trainer(small_draft(small_target()), StateDataset(data, held_out=6), tmp_path, ONE_STEP)
    folder = tmp_path / "checkpoint-0000000"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "eagle2"
    from beagle_sd import BeagleDraft

    with pytest.raises(ValueError, match="the config is of a eagle2 model; allowed: beagle"):
        BeagleDraft.from_pretrained(folder)


def test_a_target_of_another_width_is_refused():
    with pytest.raises(ValueError, match="hidden_size=64 .*given a llama with hidden_size=32"):
        eagle_draft(small_target()).bind(small_target(hidden_size=32))
