"""Packed batches: every training sequence once an epoch, the same order for a seed, held-out ones never."""

from __future__ import annotations

import pytest
import torch
from shard_cases import MANIFEST, random_sequence

from beagle_sd.data import shards
from beagle_sd.data.dataset import StateDataset
from beagle_sd.data.shards import ShardError, ShardWriter

LENGTHS = [3 + (7 * number) % 23 for number in range(40)]


@pytest.fixture
def folder(tmp_path):
    writer = ShardWriter(tmp_path, MANIFEST, tokens_per_shard=90)
    for number, length in enumerate(LENGTHS):
        writer.add(random_sequence(number, length))
    writer.flush()
    return tmp_path


def test_an_epoch_has_every_sequence_once(folder):
    dataset = StateDataset(folder, held_out=0)
    assert len(dataset.train) == 40 and not dataset.evaluation and dataset.width == 64
    assert dataset.tokens_of(dataset.train) == sum(LENGTHS)
    for epoch in range(3):
        packs = dataset.epoch(epoch, 64, seed=1)
        assert sorted(number for pack in packs for number in pack) == list(range(40))
        sizes = [sum(LENGTHS[number] for number in pack) for pack in packs]
        assert max(sizes) <= 64 and sum(sizes) / len(sizes) > 40


def test_the_order_is_the_seeds(folder):
    first, second = StateDataset(folder, held_out=0), StateDataset(folder, held_out=0)
    assert first.epoch(2, 64, seed=1) == second.epoch(2, 64, seed=1)
    assert first.epoch(2, 64, seed=1) != first.epoch(3, 64, seed=1)
    assert first.epoch(2, 64, seed=1) != first.epoch(2, 64, seed=2)


def test_a_batch_is_its_sequences_end_to_end(folder):
    dataset = StateDataset(folder, held_out=0)
    (pack, *_) = dataset.epoch(0, 64, seed=1)
    batch = dataset.load([dataset.train[number] for number in pack])
    want = [random_sequence(number, LENGTHS[number]) for number in pack]
    assert batch.cu_seqlens.tolist() == [sum(len(s.tokens) for s in want[:n]) for n in range(len(want) + 1)]
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("tokens", "loss_mask", "states"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(sequence, name) for sequence in want]))
    assert batch.positions.tolist() == [place for number in pack for place in range(LENGTHS[number])]
    assert batch.sequence.tolist() == [n for n, number in enumerate(pack) for _ in range(LENGTHS[number])]


def test_long_sequences_are_cut_to_the_context(folder):
    dataset = StateDataset(folder, context=8, held_out=0)
    assert dataset.tokens_of(dataset.train) == sum(min(length, 8) for length in LENGTHS)
    batch = dataset.load(dataset.train[:5])
    assert batch.cu_seqlens.diff().tolist() == [min(length, 8) for length in LENGTHS[:5]]
    start = int(batch.cu_seqlens[1])
    assert LENGTHS[1] > 8 and torch.equal(batch.states[start : start + 8], random_sequence(1, LENGTHS[1]).states[:8])
    assert all(len(pack) == 1 for pack in dataset.epoch(0, 4, seed=0)), "one too long for a batch has its own"


def test_held_out_sequences_are_never_trained_on(folder):
    dataset = StateDataset(folder, held_out=8)
    held = [7, 15, 23, 31, 39]
    assert [entry.rows for entry in dataset.evaluation] == [LENGTHS[number] for number in held]
    assert len(dataset.train) == 35
    batches = [dataset.load(pack) for pack in dataset.evaluation_packs(30)]
    assert torch.equal(
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([random_sequence(number, LENGTHS[number]).tokens for number in held]),
    )


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ShardError, match="has no shards: run `beagle-sd prepare` first"):
        StateDataset(tmp_path)


def test_a_truncated_shard_is_named_at_once(folder):
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError, match=f"{path} is not a whole shard"):
        StateDataset(folder)


def test_frequent_tokens_are_the_assistants_and_need_no_second_reading(folder, monkeypatch):
    dataset, counts = StateDataset(folder, held_out=3), [0] * 97
    for sequence in shards.read_sequences(folder):
        following = [*sequence.tokens[1:].tolist(), sequence.final_token]
        for token, learnt in zip(following, sequence.loss_mask.tolist(), strict=True):
            counts[token] += learnt and token >= 0
    best = sorted(range(97), key=lambda token: (-counts[token], token))
    monkeypatch.setattr(shards, "read_shard", lambda *args, **options: pytest.fail("read again"))
    for count in (1, 10, 97):
        assert dataset.frequent_tokens(count, 97).tolist() == sorted(best[:count])
    for count in (0, 98):
        with pytest.raises(ValueError, match=f"draft_vocab is {count}; allowed: 1 to 97"):
            dataset.frequent_tokens(count, 97)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_states_out_of_a_windows_reach_are_not_stored(tmp_path, window):
    """What is left in pieces has, for every row that is learnt, all rows that its window reaches."""
    whole_ones = []
    for number, length in enumerate(LENGTHS):
        sequence = random_sequence(number, length)
        mask = torch.arange(length) % 11 == number % 3
        whole_ones.append(sequence._replace(loss_mask=mask))
    writer = ShardWriter(tmp_path, MANIFEST | {"window_keys": window}, tokens_per_shard=90)
    for sequence in whole_ones:
        writer.add(sequence.within(window))
    writer.flush()
    read = sorted(shards.read_sequences(tmp_path), key=lambda sequence: sequence.index)
    dataset = StateDataset(tmp_path, held_out=0)
    assert dataset.window_keys == window
    pieces = [dataset.load([entry]) for entry in dataset.train]
    want = []
    for sequence, stored in zip(whole_ones, read, strict=True):
        learnt = sequence.loss_mask.nonzero().flatten().tolist()
        kept = [any(row - window <= place <= row for row in learnt) for place in range(len(sequence.tokens))]
        assert stored.kept.tolist() == kept and stored.states.equal(sequence.states[kept])
        assert stored.tokens.equal(sequence.tokens) and stored.loss_mask.equal(sequence.loss_mask)
        starts = [place for place in range(len(kept)) if kept[place] and not (place and kept[place - 1])]
        want += [
            (sequence, start, next((p for p in range(start, len(kept)) if not kept[p]), len(kept))) for start in starts
        ]
    assert len(pieces) == len(want) and (window > 3 or len(want) > len(whole_ones))
    for piece, (sequence, start, end) in zip(pieces, want, strict=True):
        for name in ("tokens", "loss_mask", "states"):
            assert torch.equal(getattr(piece, name), getattr(sequence, name)[start:end])
        assert piece.positions.tolist() == list(range(end - start))
