"""adjust_logits against transformers' processors, called on the nodes' texts as rows, and readable PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from beagle_kernels import Adjustments, adjust_logits
from bench.registry import DTYPES, SHAPES, Case, assert_near, drive, label, parameters

DEPTH, REPETITION, NGRAM = 6, 1.2, 3


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if size == "scaling":
        return
    texts = (30,) if size == "tiny" else (300, 4096)
    for vocab, nodes in [(128256, 60)] if size == "full" else SHAPES[size]:
        drawn = torch.randn(1, nodes, vocab, device=device)
        for dtype in DTYPES[size]:
            for length in texts:
                for ngram in (0, NGRAM):
                    yield of_logits(drawn.to(dtype), length, ngram)


def of_logits(logits: torch.Tensor, length: int, ngram: int) -> Case:
    """A repetition penalty, and a frequency penalty where there are no n-grams, on a text of tokens drawn by Zipf's
    law, a third of it the prompt."""
    (_, nodes, vocab), device = logits.shape, logits.device.type
    law = 1 / torch.arange(1, vocab + 1)
    text = law.multinomial(length, replacement=True)[None].to(device)
    paths = law.multinomial(nodes * DEPTH, replacement=True).view(1, nodes, DEPTH).to(device)
    lengths, prompts = (torch.tensor([n], dtype=torch.int32, device=device) for n in (length, length // 3))
    frequency = 0.0 if ngram else 0.1
    settings = Adjustments.of(1, repetition=REPETITION, frequency=frequency, ngram=ngram, device=device)
    args = logits, paths, text, lengths, prompts, settings
    rows = torch.cat((text.expand(nodes, -1), paths[0]), 1)

    def eager() -> torch.Tensor:
        z, given = logits[0].float(), rows[:, length // 3 :]
        at = z.gather(1, rows)
        z = z.scatter(1, rows, torch.where(at < 0, at * REPETITION, at / REPETITION))
        if frequency:
            z = z.scatter_add(1, given, torch.full(given.shape, -frequency, device=device))
        return banned(z, rows, ngram) if ngram else z

    def check() -> None:
        want = adjust_logits(*args, backend="reference")
        assert torch.equal(adjust_logits(*args), want), "adjust_logits is wrong"

    def check_peer(name: str) -> None:
        have, want = peers[name](), adjust_logits(*args)[0]
        assert torch.equal(have.isinf(), want.isinf()), f"{name} bans other tokens"
        assert_near(name, have.masked_fill(have.isinf(), 0), want.masked_fill(want.isinf(), 0), 1e-4)

    what = f"{NGRAM}-grams" if ngram else "penalties"
    dtype = str(logits.dtype)[6:]
    peers = {
        "beagle": lambda: adjust_logits(*args),
        "transformers": by_transformers(logits, rows, frequency, length // 3, ngram),
        "PyTorch": eager,
        "copy": lambda: logits.to(torch.float32, copy=True),
    }
    return Case(
        f"adjust_logits {what} {nodes} x {vocab} {dtype}, text of {length}",
        peers,
        check,
        bounds=("copy",),
        rounds=9,
        device=device,
        work={"byte": float(logits.numel() * (logits.element_size() + 4))},
        check_peer=lambda name: None if name == "copy" else check_peer(name),
        at={"nodes": nodes, "vocabulary": vocab, "type": dtype, "text": length},
    )


def banned(z: torch.Tensor, rows: torch.Tensor, n: int) -> torch.Tensor:
    """-inf where a token would complete an n-gram of its row."""
    windows = rows.unfold(1, n, 1)
    match = (windows[..., :-1] == rows[:, None, rows.shape[1] + 1 - n :]).all(-1)
    mask = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool, device=z.device)
    return z.masked_fill(mask.scatter_(1, torch.where(match, windows[..., -1], z.shape[1]), True)[:, :-1], -torch.inf)


def by_transformers(logits: torch.Tensor, rows: torch.Tensor, frequency: float, prompt: int, ngram: int):
    """Its processors one after the other; it has no frequency penalty, which is left to the row's own bincount."""
    try:
        from transformers.generation import logits_process
    except ImportError as error:
        return str(error)
    chain: list[Any] = [logits_process.RepetitionPenaltyLogitsProcessor(REPETITION)]
    if ngram:
        chain.append(logits_process.NoRepeatNGramLogitsProcessor(ngram))

    def run() -> torch.Tensor:
        z = logits[0].float()
        for processor in chain:
            z = processor(rows, z)
        if frequency:
            given = rows[:, prompt:]
            z.scatter_add_(1, given, torch.full(given.shape, -frequency, device=z.device))
        return z

    return run


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_adjust_logits(benchmark, case, peer):
    drive(benchmark, case, peer)
