"""State shards of small targets for the tests."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from models import VOCAB

from beagle_sd.data.shards import Sequence, ShardWriter

MANIFEST = {"target": "small", "hidden_size": 64, "vocab_size": VOCAB}


def random_sequence(index: int, length: int, width: int = 64) -> Sequence:
    """Random tokens and states, the same for the same arguments."""
    pick = torch.Generator().manual_seed(index)
    return Sequence(
        torch.randint(VOCAB, (length,), generator=pick),
        torch.rand(length, generator=pick) < 0.7,
        torch.randn(length, width, generator=pick).to(torch.bfloat16),
        int(torch.randint(-1, VOCAB, (), generator=pick)),
        index,
        (-1.0, 0.0, 0.7)[index % 3],
    )


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file can grow beyond `most` bytes: what a writer meets on a full disk, from the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@torch.no_grad()
def write_states(folder: Path, target, count: int = 12, length: int = 40) -> Path:
    """Shards of what `target` writes by itself, with its states."""
    pick = torch.Generator().manual_seed(1)
    prompts = torch.randint(VOCAB, (count, 4), generator=pick)
    tokens = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, do_sample=False)
    states = target.model(tokens).last_hidden_state.to(torch.bfloat16)
    writer = ShardWriter(folder, MANIFEST, tokens_per_shard=length * 5)
    for index in range(count):
        end = length - 3 * (index % 5)
        mask = torch.arange(end) >= 3
        writer.add(Sequence(tokens[index, :end], mask, states[index, :end], int(tokens[index, end]), index, 0.0))
    writer.flush()
    return folder
