"""Training: it learns, and it stops rather than spoil what it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import agreeable_target, small_draft, small_target
from shard_cases import MANIFEST, random_sequence, write_states
from training_cases import CONFIG, metrics_of, trainer_of

from beagle_sd import BeagleDraft, generate
from beagle_sd.data.dataset import Entry, StateDataset
from beagle_sd.data.shards import ShardWriter
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.training.trainer import Trainer
from bench.peers.eagle2 import EagleDraft, eagle_states


def test_the_loss_falls_in_both_stages(whole):
    trainer, folder = whole
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == list(range(1, trainer.total_steps + 1))
    assert [line["stage"] for line in lines] == [1] * trainer.block_steps + [2] * (len(lines) - trainer.block_steps)
    first, last = lines[0]["loss"], [line["loss"] for line in lines if line["stage"] == 1][-3:]
    assert sum(last) / 3 < 0.9 * first
    assert sum(line["loss"] for line in lines[-3:]) / 3 < 0.9 * first
    evaluated = [line["step"] for line in lines if "acceptance_by_depth" in line]
    assert evaluated == sorted({*range(7, len(lines) + 1, 7), trainer.block_steps, trainer.total_steps})
    assert lines[-1]["tokens_seen"] == trainer.tokens_seen > 5 * 0.8 * 10 * 28


def test_a_run_leaves_two_checkpoints_and_the_draft(whole):
    trainer, folder = whole
    names = sorted(path.name for path in folder.iterdir())
    last, before = trainer.total_steps, (trainer.total_steps - 1) // 4 * 4
    assert names == [f"checkpoint-{before:07d}", f"checkpoint-{last:07d}", "final", "metrics.jsonl"]
    again = BeagleDraft.from_pretrained(folder / "final")
    assert all(torch.equal(weight, trainer.draft.state_dict()[name]) for name, weight in again.state_dict().items())


def test_the_learning_rate_follows_its_schedule(whole):
    rates = [line["lr"] for line in metrics_of(whole[1])]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3] == pytest.approx(1e-2) and all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))
    assert 1e-3 <= rates[-1] < 1.5e-3


@pytest.mark.parametrize("head", ["beagle", "eagle2"])
def test_autocast_loses_what_bf16_loses(head, data, tmp_path):
    """Both stages with matrix products in bf16: the losses of a few steps are those of fp32 to 2%."""
    losses = []
    for autocast in (False, True):
        config = replace(CONFIG, autocast=autocast, block_epochs=0.5, simulation_epochs=0.5, lr=1e-3)
        torch.manual_seed(1)
        draft = (BeagleDraft if head == "beagle" else EagleDraft).from_target(small_target())
        states = {} if head == "beagle" else {"states": eagle_states}
        trainer = Trainer(draft, StateDataset(data, held_out=6), tmp_path / f"{autocast}", config, **states)
        trainer.run()
        losses.append([line["loss"] for line in metrics_of(tmp_path / f"{autocast}")])
    assert {line["stage"] for line in metrics_of(tmp_path / "True")} == {1, 2}
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]


def test_steps_in_which_nothing_is_learnt_are_finite_and_the_run_goes_on(tmp_path):
    """Shards of older versions have sequences without a token of the loss; held-out ones among them."""
    writer = ShardWriter(tmp_path / "states", MANIFEST)
    for index in range(12):
        sequence = random_sequence(index, 30)
        learnt = sequence.loss_mask if index % 6 == 1 else torch.zeros(30, dtype=torch.bool)
        writer.add(sequence._replace(loss_mask=learnt))
    writer.flush()
    config = replace(CONFIG, tokens_per_step=30, block_epochs=1.0, simulation_epochs=1.0)
    trainer = trainer_of(tmp_path / "states", tmp_path / "run", config)
    trainer.run()
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert len(losses) == 20 and losses.count(0.0) == 16 and all(torch.tensor(losses).isfinite())
    assert all(weight.isfinite().all() for weight in trainer.draft.parameters())


@pytest.mark.slow
def test_training_raises_acceptance(tmp_path):
    """What the losses are for: more tokens a round on text of the same target, drafted from true states."""
    target = agreeable_target()
    target.get_input_embeddings().weight.data.div_(4)
    data = write_states(tmp_path / "data", target, count=60)
    draft = small_draft(target)
    ids = StateDataset(data, held_out=0).load([Entry(0, 0, 8)]).tokens[None]

    def tokens_per_round():
        return generate(target, draft, ids, max_new_tokens=32, tree=TreeShape(4, 1, 5)).report.tokens_per_round

    before = tokens_per_round()
    config = replace(CONFIG, block_epochs=30, simulation_epochs=20, save_steps=1000, eval_steps=1000, held_out=0)
    Trainer(draft, StateDataset(data, held_out=0), tmp_path / "out", config).run()
    assert tokens_per_round() > before + 0.5


@pytest.mark.parametrize("steps,lengths", [(1, [9, 2]), (4, [1, 2, 3]), (5, [4, 5, 6, 30]), (7, [7, 14, 6])], ids=str)
def test_stage_two_at_window_boundaries(steps, lengths, tmp_path):
    """Sequences shorter than, equal to and around the window, in one batch; those without a countable row too."""
    writer = ShardWriter(tmp_path / "data", MANIFEST)
    for index, length in enumerate(lengths):
        writer.add(random_sequence(index, length))
    writer.flush()
    config = replace(CONFIG, steps=steps, block_epochs=0.0, simulation_epochs=6.0, held_out=0, tokens_per_step=999)
    trainer_of(tmp_path / "data", tmp_path / "out", config).run()
    lines = metrics_of(tmp_path / "out")
    assert len(lines) == 6 and all(line["stage"] == 2 for line in lines)
    assert max(lengths) <= steps or any(line["loss"] > 0 for line in lines)


def test_reduced_vocabulary_and_detached_states_train(data, tmp_path):
    config = replace(CONFIG, detach_states=True, regression=0.0, noise=0.0)
    trainer_of(data, tmp_path, config, draft_vocab=torch.arange(0, 97, 2), append_states=True).run()
    lines = metrics_of(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len(lines[-1]["acceptance_by_depth"]) == 6


def test_evaluation_counts_as_figure_3_does(data, tmp_path):
    """A draft that always agrees is always right; one that never does, never."""
    trainer = trainer_of(data, tmp_path)
    right = trainer.held_out.agreement
    trainer.held_out.agreement = lambda states, choices, counted: counted.clone()
    assert trainer.evaluate(depth=3) == [1.0, 1.0, 1.0]
    trainer.held_out.agreement = lambda states, choices, counted: torch.zeros_like(counted)
    assert trainer.evaluate(depth=3) == [0.0, 0.0, 0.0]
    batch = trainer.dataset.load(trainer.dataset.evaluation_packs(200)[0])
    choices = trainer.held_out.target_choices(batch)
    assert right(batch.states, choices, batch.loss_mask).equal(batch.loss_mask)
    assert not right(-batch.states, choices, torch.ones_like(batch.loss_mask)).any()


def test_states_of_another_width_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "data", MANIFEST)
    writer.add(random_sequence(0, 9, width=32))
    writer.flush()
    with pytest.raises(ValueError, match="the states are 32 wide; allowed: the draft's hidden_size, 64"):
        trainer_of(tmp_path / "data", tmp_path / "out", replace(CONFIG, held_out=0))


def test_states_within_a_window_are_for_drafts_that_have_it(tmp_path):
    writer = ShardWriter(tmp_path / "data", MANIFEST | {"window_keys": 8})
    writer.add(random_sequence(0, 9).within(8))
    writer.flush()
    with pytest.raises(ValueError, match="window_keys is None, but only the states within 8 .*allowed: 1 to 8"):
        trainer_of(tmp_path / "data", tmp_path / "out", replace(CONFIG, held_out=0))


def test_nothing_to_train_on_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="no sequence to train on: all 12 are held out"):
        trainer_of(data, tmp_path, replace(CONFIG, held_out=1))


@pytest.mark.parametrize("name", ["window", "steps"])
def test_windows_beyond_the_keys_that_are_seen_are_refused(name, data, tmp_path):
    """And the evaluation goes as deep as they reach."""
    with pytest.raises(ValueError, match=f"{name} is 5; allowed: up to the draft's window_keys, 4"):
        trainer_of(data, tmp_path, replace(CONFIG, **{name: 5}), window_keys=4)
    assert len(trainer_of(data, tmp_path, window_keys=4).evaluate()) == 4


@pytest.mark.parametrize("wrong", [{"window": 0}, {"lr": -1.0}, {"schedule": "linear"}, {"save_steps": 0}], ids=str)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*; allowed"):
        replace(CONFIG, **wrong)


def test_tensorboard_holds_every_step(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(small_draft(small_target()), StateDataset(data, held_out=6), tmp_path, CONFIG, tensorboard=True)
    trainer.run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in metrics_of(tmp_path)})
    assert len(events.Scalars("acceptance/depth_5")) == sum("acceptance_by_depth" in x for x in metrics_of(tmp_path))
