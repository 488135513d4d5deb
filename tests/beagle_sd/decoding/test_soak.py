"""Many rounds with random ends and lengths, threads, forks: always the text of plain decoding, memory flat.

BEAGLE_SOAK=1000 python -m pytest tests/beagle_sd/decoding/test_soak.py runs a thousand batches instead of a few.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import threading

import pytest
import torch
from models import VOCAB, agreeable_target, small_draft
from pool_work import chosen, put_chosen

from beagle_sd import generate
from beagle_sd.decoding.trees.tree import TreeShape

BATCHES = int(os.environ.get("BEAGLE_SOAK", "12"))
SETTINGS = (
    {},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.05},
)


def megabytes() -> float:
    """Resident now, not the peak."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def random_request(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Eight ragged prompts and what to do with them: ends, limits, tree shapes and sampling at random."""
    lengths = [rng.randint(1, 12) for _ in range(8)]
    ids = torch.tensor([[rng.randrange(VOCAB) for _ in range(12)] for _ in lengths])
    mask = (torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]).long()
    depth, branch = rng.randint(1, 5), rng.randint(1, 4)
    options = {
        "max_new_tokens": rng.randint(1, 40),
        "eos_token_id": rng.sample(range(VOCAB), rng.randint(0, 6)),
        "seed": rng.randrange(2**40),
        **rng.choice(SETTINGS),
    }
    return ids, mask, {**options, "tree": TreeShape(depth, branch, rng.randint(1, 20))}


def plainly(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "tree"}


def test_soak():
    target, rng, accepted = agreeable_target(), random.Random(0), 0
    draft, sizes = small_draft(target), []
    for number in range(BATCHES):
        ids, mask, options = random_request(rng)
        found = generate(target, draft, ids, mask, **options)
        assert found.sequences.equal(generate(target, None, ids, mask, **plainly(options)).sequences), (number, options)
        accepted += sum(found.report.reached[1:])
        sizes.append(megabytes())
    assert accepted > 0
    third = BATCHES // 3
    assert max(sizes[-third:]) - max(sizes[:third]) < 32  # warm-up is over by then


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_generate_at_once(shared):
    """With one target and draft for both, or two; the target's attention comes back as it was."""
    targets = [agreeable_target()] * 2 if shared else [agreeable_target(), agreeable_target()]
    drafts = [small_draft(targets[0])] * 2 if shared else [small_draft(target) for target in targets]
    before = targets[0].config._attn_implementation
    requests = [random_request(random.Random(number)) for number in range(6)]
    want = [generate(targets[0], None, ids, mask, **plainly(options)).sequences for ids, mask, options in requests]
    found: list[list[torch.Tensor]] = [[], []]

    def work(thread: int) -> None:
        for ids, mask, options in requests[thread * 3 :] + requests[: thread * 3]:
            found[thread].append(generate(targets[thread], drafts[thread], ids, mask, **options).sequences)

    run_at_once([threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(2)])
    for thread, sequences in enumerate(found):
        assert len(sequences) == 6
        assert all(map(torch.equal, sequences, want[thread * 3 :] + want[: thread * 3]))
    assert [target.config._attn_implementation for target in targets] == [before] * 2


def run_at_once(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def test_many_threads_share_the_pool():
    want, found = chosen(threads=1), []

    def work() -> None:
        found.extend(chosen() for _ in range(20))

    run_at_once([threading.Thread(target=work, daemon=True) for _ in range(4)])
    assert len(found) == 80 and all(tokens.equal(want) for tokens in found)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_child_processes(start):
    """Threads do not survive a fork: a child must start a pool of its own."""
    want = chosen().tolist()
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=put_chosen, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == want
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
