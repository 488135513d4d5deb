"""Training: it learns, it resumes bit for bit, and it stops rather than spoil what it has."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from models import agreeable_target, small_draft, small_target
from shard_cases import MANIFEST, full_disk, random_sequence, write_states
from training_cases import CONFIG, Stop, metrics_of, trainer_of

from beagle_sd import BeagleDraft, generate
from beagle_sd.data.dataset import Entry, StateDataset
from beagle_sd.data.shards import ShardWriter
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.training.checkpoint import checkpoints
from beagle_sd.training.trainer import Trainer, TrainingStopped
from bench.peers.eagle2 import EagleDraft, eagle_states


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_states(tmp_path_factory.mktemp("states"), small_target())


def weights_of(folder: Path) -> dict:
    return BeagleDraft.from_pretrained(folder / "final").state_dict()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(data, folder)
    trainer.run()
    return trainer, folder


def assert_same_run(folder: Path, whole) -> None:
    assert metrics_of(folder) == metrics_of(whole[1])
    assert all(torch.equal(weight, weights_of(whole[1])[name]) for name, weight in weights_of(folder).items())


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


@pytest.mark.parametrize("stop", [1, 4, 6, 13])
def test_a_stopped_run_resumes_bit_for_bit(stop, data, whole, tmp_path):
    """Before the first checkpoint, at one, after one, and in stage 2."""

    def interrupt(step, metrics):
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        trainer_of(data, tmp_path).run(interrupt)
    resumed = trainer_of(data, tmp_path)
    assert resumed.step == stop // 4 * 4
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, resumed.step + 1))
    resumed.run()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("where", ["between steps", "in a checkpoint"])
def test_a_killed_run_resumes_bit_for_bit(where, data, whole, tmp_path):
    def progress(step, metrics):
        if step == 9:
            if where == "between steps":
                forks.die()
            torch.save = forks.die

    assert forks.run(lambda: trainer_of(data, tmp_path).run(progress)) == -9
    if where == "in a checkpoint":
        (half,) = tmp_path.glob(".*.partial.checkpoint-0000012")
        assert (half / "model.safetensors").is_file(), "killed halfway"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    resumed = trainer_of(data, tmp_path)
    assert resumed.step == 8 and not list(tmp_path.glob(".*"))
    resumed.run()
    assert_same_run(tmp_path, whole)


def test_a_finished_run_does_nothing_more(data, whole, tmp_path):
    import shutil

    shutil.copytree(whole[1], tmp_path / "copy")
    trainer = trainer_of(data, tmp_path / "copy")
    assert trainer.step == trainer.total_steps
    trainer.run(lambda step, metrics: pytest.fail("trained on"))
    assert_same_run(tmp_path / "copy", whole)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lr": 1e-3}, "lr 0.01 -> 0.001"),
        ({"steps": 2}, "steps 3 -> 2"),
        ({"betas": (0.9, 0.99)}, "betas"),
        ({"held_out": 0}, "held_out 6 -> 0, sequences 10 -> 12"),
    ],
    ids=str,
)
def test_other_settings_are_refused(change, message, data, whole):
    with pytest.raises(ValueError, match=f"trained with other settings .*{message}.*use the same, or a new folder"):
        trainer_of(data, whole[1], replace(CONFIG, **change))


def test_another_draft_is_refused(data, whole, tmp_path):
    with pytest.raises(ValueError, match="append_states True -> False"):
        trainer_of(data, whole[1], append_states=False)
    trainer_of(data, tmp_path, draft_vocab=torch.arange(50)).save()
    trainer_of(data, tmp_path, draft_vocab=torch.arange(50))
    with pytest.raises(ValueError, match="trained with another draft_vocab"):
        trainer_of(data, tmp_path, draft_vocab=torch.arange(1, 51))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer.json"])
@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_checkpoint_is_named(name, keep, data, tmp_path):
    trainer_of(data, tmp_path).save()
    path = checkpoints(tmp_path)[-1] / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="checkpoint-0000000 is not a whole checkpoint .*delete it"):
        trainer_of(data, tmp_path)


def test_states_that_are_not_numbers_stop_the_run(data, tmp_path):
    trainer = trainer_of(data, tmp_path)
    load, calls = trainer.dataset.load, []

    def spoiled(entries):
        calls.append(entries)
        batch = load(entries)
        if len(calls) == 6:
            batch.states[3] = torch.nan
        return batch

    trainer.dataset.load = spoiled
    with pytest.raises(TrainingStopped, match=r"step 5: loss is nan.*last good checkpoint is kept in .*lower lr"):
        trainer.run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000004"]
    assert all(parameter.isfinite().all() for parameter in trainer.draft.parameters())
    assert not (tmp_path / "final").exists()
    assert trainer_of(data, tmp_path).step == 4


@pytest.mark.parametrize("most", [20_000, 150_000], ids=["no room for weights", "no room for the optimizer"])
def test_a_full_disk_keeps_the_last_checkpoint(most, data, whole, tmp_path):
    with ExitStack() as disk:

        def fill(step, metrics):
            if step == 6:
                disk.enter_context(full_disk(most))

        with pytest.raises(OSError, match=r"checkpoint-0000008 could not be written \(.*is the disk full\?"):
            trainer_of(data, tmp_path).run(fill)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000004"] and not list(tmp_path.glob(".*"))
    resumed = trainer_of(data, tmp_path)
    assert resumed.step == 4
    resumed.run()
    assert_same_run(tmp_path, whole)


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


def test_nothing_to_train_on_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="no sequence to train on: all 12 are held out"):
        trainer_of(data, tmp_path, replace(CONFIG, held_out=1))


@pytest.mark.parametrize("wrong", [{"window": 0}, {"lr": -1.0}, {"schedule": "linear"}, {"save_steps": 0}], ids=str)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*; allowed"):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize("processes, micro_batches", [(1, 3), (2, 1), (2, 2)])
def test_a_shared_batch_trains_as_a_whole_one(processes, micro_batches, data, whole, tmp_path):
    """Losses are sums over the weight of the whole batch: processes and micro-batches change rounding only."""
    run_shared(data, tmp_path / "out", processes, micro_batches)
    assert_same_but_for_rounding(tmp_path / "out", whole)


def assert_same_but_for_rounding(folder: Path, whole) -> None:
    for mine, theirs in zip(metrics_of(folder), metrics_of(whole[1]), strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"] and mine["lr"] == theirs["lr"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine.keys() == theirs.keys()
    first, same = metrics_of(folder)[0], metrics_of(whole[1])[0]
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert first["gradient_norm"] == pytest.approx(same["gradient_norm"], rel=1e-5)


def test_two_processes_resume_as_they_were(data, tmp_path):
    for folder, stop in (("straight", 0), ("stopped", 6)):
        run_shared(data, tmp_path / folder, 2, 2, stop)
    run_shared(data, tmp_path / "stopped", 2, 2)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "straight")
    assert all(
        torch.equal(weight, weights_of(tmp_path / "straight")[name])
        for name, weight in weights_of(tmp_path / "stopped").items()
    )


def run_shared(data: Path, folder: Path, processes: int, micro_batches: int, stop: int = 0) -> None:
    def train() -> None:
        trainer = trainer_of(data, folder, replace(CONFIG, micro_batches=micro_batches))
        assert trainer.processes.num_processes == processes

        def progress(step, metrics):
            if step == stop:
                os._exit(0)

        trainer.run(progress)

    assert forks.run_ranks(processes, train) == [0] * processes


_UNDER_TORCHRUN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_cases import CONFIG, trainer_of
trainer_of(Path(sys.argv[1]), Path(sys.argv[2]), replace(CONFIG, micro_batches=2)).run()
"""


@pytest.mark.slow
def test_under_torchrun(data, whole, tmp_path):
    """The launcher itself: two processes, two micro-batches each."""
    (tmp_path / "shared.py").write_text(_UNDER_TORCHRUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "shared.py"), str(data), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_but_for_rounding(tmp_path / "out", whole)


def test_tensorboard_holds_every_step(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(small_draft(small_target()), StateDataset(data, held_out=6), tmp_path, CONFIG, tensorboard=True)
    trainer.run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in metrics_of(tmp_path)})
    assert len(events.Scalars("acceptance/depth_5")) == sum("acceptance_by_depth" in x for x in metrics_of(tmp_path))
