"""Shards: what is written is read, nothing half-written is taken for whole, and work goes on where it stopped."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from shard_cases import MANIFEST, full_disk, random_sequence

from beagle_sd.data import shards
from beagle_sd.data.shards import ShardError, ShardWriter

LENGTHS = (5, 1, 17, 8, 3, 12)


def write(folder, numbers=range(6), tokens_per_shard=20):
    writer = ShardWriter(folder, MANIFEST, tokens_per_shard)
    for number in numbers:
        writer.add(random_sequence(number, LENGTHS[number]))
    writer.flush()


def assert_same(ours, theirs):
    assert (ours.final_token, ours.index) == (theirs.final_token, theirs.index)
    assert ours.temperature == pytest.approx(theirs.temperature)
    for name in ("tokens", "loss_mask", "states"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name


def test_what_is_written_is_read(tmp_path):
    write(tmp_path)
    assert [path.name for path in shards.shard_paths(tmp_path)] == [f"states-{n:05d}.safetensors" for n in range(2)]
    found = list(shards.read_sequences(tmp_path))
    assert len(found) == 6
    for number, sequence in enumerate(found):
        assert_same(sequence, random_sequence(number, LENGTHS[number]))
    bare = list(shards.read_sequences(tmp_path, with_states=False))
    assert all(torch.equal(a.tokens, b.tokens) and a.states.numel() == 0 for a, b in zip(bare, found, strict=True))
    assert not list(tmp_path.glob("*.partial.*"))


def test_half_precision_is_kept(tmp_path):
    sequence = random_sequence(0, 9)
    writer = ShardWriter(tmp_path, MANIFEST)
    writer.add(sequence._replace(states=sequence.states.half()))
    writer.flush()
    (found,) = shards.read_sequences(tmp_path)
    assert found.states.dtype == torch.float16 and torch.equal(found.states, sequence.states.half())


def test_a_second_writer_goes_on_after_the_first(tmp_path):
    write(tmp_path, range(3))
    (tmp_path / f".{platform.node()}~{2**22 + 1}~0.partial.states-00001.safetensors").write_bytes(b"of a killed run")
    before = {path: path.read_bytes() for path in shards.shard_paths(tmp_path)}
    write(tmp_path, range(3, 6))
    assert not list(tmp_path.glob("*.partial.*"))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert [sequence.index for sequence in shards.read_sequences(tmp_path)] == list(range(6))


def test_a_deleted_shard_does_not_cost_another(tmp_path):
    """The advice for a damaged shard is to delete it and go on: later shards must survive that."""
    write(tmp_path, tokens_per_shard=1)
    (tmp_path / "states-00002.safetensors").unlink()
    write(tmp_path, [2], tokens_per_shard=1)
    assert sorted(sequence.index for sequence in shards.read_sequences(tmp_path)) == list(range(6))


def test_a_full_disk_keeps_the_shards_before(tmp_path):
    write(tmp_path, range(3))
    with full_disk(1000), pytest.raises(OSError, match=r"states-00001.safetensors could not be written .*disk full"):
        write(tmp_path, range(3, 6))
    assert [path.name for path in tmp_path.glob("states*")] == ["states-00000.safetensors"]
    write(tmp_path, range(3, 6))
    assert [sequence.index for sequence in shards.read_sequences(tmp_path)] == list(range(6))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(keep, tmp_path):
    write(tmp_path)
    path = shards.shard_paths(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match=f"{path} is not a whole shard .*delete it"):
        list(shards.read_sequences(tmp_path))


def test_a_shard_of_another_kind_is_named(tmp_path):
    from safetensors.torch import save_file

    write(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "states-00000.safetensors")
    with pytest.raises(ShardError, match="states-00000.safetensors is not a whole shard"):
        list(shards.read_sequences(tmp_path))


def test_lengths_that_do_not_add_up_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    write(tmp_path)
    path = tmp_path / "states-00000.safetensors"
    save_file({**load_file(path), "lengths": torch.tensor([1, 2], dtype=torch.int32)}, path)
    with pytest.raises(ShardError, match="lengths add up to 3"):
        shards.read_shard(path)


def test_the_manifest_of_another_target_is_refused(tmp_path):
    write(tmp_path)
    assert shards.check_manifest(tmp_path, hidden_size=64)["target"] == "small"
    with pytest.raises(ShardError, match="hidden_size=64; this target has 128"):
        shards.check_manifest(tmp_path, vocab_size=97, hidden_size=128)
    with pytest.raises(ShardError, match="begun with target='small', not 'large'"):
        ShardWriter(tmp_path, {**MANIFEST, "target": "large"})
    assert json.loads((tmp_path / "manifest.json").read_text())["target"] == "small"


def test_missing_and_broken_manifests_are_named(tmp_path):
    with pytest.raises(ShardError, match="manifest.json is missing"):
        shards.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"target": "sm')
    with pytest.raises(ShardError, match="manifest.json is not JSON"):
        shards.read_manifest(tmp_path)
