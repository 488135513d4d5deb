"""Work for the extension's thread pool; a child that is spawned imports this and little else."""

from __future__ import annotations

import torch

import beagle_kernels as bk


def chosen(rows: int = 64, vocab: int = 5000, threads: int = 4) -> torch.Tensor:
    """Tokens by the extension's thread pool."""
    torch.set_num_threads(threads)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    try:
        return bk.choose_tokens(logits, torch.arange(rows), bk.Sampling.of(rows, 3, 1.0))[0]
    finally:
        torch.set_num_threads(1)


def put_chosen(queue) -> None:
    queue.put(chosen().tolist())
