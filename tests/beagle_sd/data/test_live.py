"""States computed live are the states of shards, whatever is kept and however batches are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import VOCAB, small_draft, small_target
from shard_cases import MANIFEST

from beagle_sd.data.conversations import Conversation, read_answers, write_answer_file
from beagle_sd.data.dataset import StateDataset
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.data.shards import Sequence, ShardWriter
from beagle_sd.data.states import sequences_with_states
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.trainer import Trainer

CONFIG = TrainingConfig(
    window=3,
    steps=2,
    block_epochs=1.0,
    simulation_epochs=1.0,
    tokens_per_step=100,
    lr=1e-2,
    warmup_steps=2,
    held_out=6,
    eval_steps=5,
    save_steps=2,
    seed=3,
)


def conversations(count: int = 20) -> list[Conversation]:
    pick = torch.Generator().manual_seed(5)
    lengths = [1, 2, *(5 + (11 * number) % 29 for number in range(count - 2))]
    return [
        Conversation(
            number,
            torch.randint(VOCAB, (length,), generator=pick).tolist(),
            [place >= length // 3 for place in range(length)],
            0.0,
        )
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The conversations as a file of answers."""
    path = tmp_path_factory.mktemp("answers") / "answers.npz"
    sequences = [
        Sequence(torch.tensor(c.ids[:-1]), torch.tensor(c.learn[1:]), torch.empty(0), c.ids[-1], c.index, 0.0)
        for c in conversations()
        if len(c.ids) > 1
    ]
    write_answer_file(path, sequences, {})
    return path


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("context", [64, 16])
def test_batches_are_those_of_shards(keep, context, tmp_path):
    target = small_target()
    writer = ShardWriter(tmp_path, MANIFEST, tokens_per_shard=10**6)
    for sequence in sorted(sequences_with_states(target, conversations()), key=lambda sequence: sequence.index):
        writer.add(sequence)
    writer.flush()
    stored = StateDataset(tmp_path, context=context, held_out=6)
    live = LiveDataset(target, Corpus.of(conversations()), context=context, held_out=6, keep=keep)
    assert live.width == stored.width == 64
    assert live.epoch(1, 70, 2) == stored.epoch(1, 70, 2) and len(live.evaluation) == len(stored.evaluation) > 0
    for mine, theirs in ((live.train, stored.train), (live.evaluation, stored.evaluation)):
        found, want = live.load(mine), stored.load(theirs)
        for name in ("tokens", "loss_mask", "cu_seqlens", "positions"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name
        torch.testing.assert_close(found.states, want.states, rtol=1e-2, atol=1e-3)


def test_a_file_of_answers_is_its_conversations(answers):
    corpus, again = Corpus.of_answers([answers]), Corpus.of(read_answers(answers, 10**6))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(corpus, again))
    assert corpus.lengths.tolist() == [len(c.ids) for c in conversations() if len(c.ids) > 1]
    twice = Corpus.of_answers([answers, answers])
    assert torch.equal(twice.ids, torch.cat([corpus.ids, corpus.ids])) and len(twice.learn) == 2 * len(corpus.learn)
    some = Corpus.of_answers([answers], tokens=60)
    assert 0 < len(some.ids) <= 60 < len(some.ids) + int(corpus.lengths[len(some.lengths)])


def test_frequent_tokens_are_those_to_learn():
    corpus = Corpus.of([Conversation(0, [5, 5, 7, 7, 7, 9, 2], [False, False, True, True, True, True, True], 0.0)])
    live = LiveDataset(small_target(), corpus, held_out=0)
    assert live.frequent_tokens(2, VOCAB).tolist() == [2, 7]
    with pytest.raises(ValueError, match="draft_vocab is 98; allowed: 1 to 97"):
        live.frequent_tokens(98, VOCAB)


def test_another_targets_tokens_are_refused():
    with pytest.raises(ValueError, match="has token 97; allowed: below the target's vocabulary of 97"):
        LiveDataset(small_target(), Corpus.of([Conversation(0, [3, 97], [False, True], 0.0)]))


class Stop(Exception):
    """As Ctrl-C would be."""


@pytest.mark.parametrize("keep", [False, True])
def test_a_stopped_live_run_resumes_bit_for_bit(keep, tmp_path):
    def trainer(folder):
        target = small_target()
        dataset = LiveDataset(target, Corpus.of(conversations()), held_out=CONFIG.held_out, keep=keep)
        return Trainer(small_draft(target), dataset, folder, replace(CONFIG, noise=0.1))

    def interrupt(step, metrics):
        if step == 3:
            raise Stop

    whole = trainer(tmp_path / "whole")
    whole.run()
    with pytest.raises(Stop):
        trainer(tmp_path / "parts").run(interrupt)
    resumed = trainer(tmp_path / "parts")
    assert resumed.step == 2 < whole.total_steps
    resumed.run()
    assert all(
        torch.equal(weight, whole.draft.state_dict()[name]) for name, weight in resumed.draft.state_dict().items()
    )
