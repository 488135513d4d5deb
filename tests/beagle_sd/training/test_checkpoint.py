"""A run that ended early goes on bit for bit, and what cannot be gone on with is named."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import forks
import pytest
import torch
from shard_cases import full_disk
from training_cases import CONFIG, Stop, assert_same_run, metrics_of, trainer_of

from beagle_sd.training.checkpoint import checkpoints
from beagle_sd.training.trainer import TrainingStopped


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


def test_a_stopped_run_with_muon_resumes_bit_for_bit(data, tmp_path):
    def interrupt(step, metrics):
        if step == 6:
            raise Stop

    config = replace(CONFIG, optimizer="muon", block_epochs=1.0, simulation_epochs=1.0)
    whole = trainer_of(data, tmp_path / "whole", config), tmp_path / "whole"
    whole[0].run()
    with pytest.raises(Stop):
        trainer_of(data, tmp_path / "stopped", config).run(interrupt)
    resumed = trainer_of(data, tmp_path / "stopped", config)
    assert resumed.step == 4
    resumed.run()
    assert_same_run(tmp_path / "stopped", whole)


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
