"""Inputs and statistics shared by the tests of the sampling ops."""

from __future__ import annotations

import torch
from torch import Tensor

from beagle_kernels import Sampling
from beagle_kernels.lossless import p_value


def mixed_sampling(rows: int, seed: int = 0) -> Sampling:
    """Rows that are greedy, plain, and filtered in every combination."""
    pick = torch.Generator().manual_seed(seed)
    one_of = lambda values: torch.tensor(values)[torch.randint(len(values), (rows,), generator=pick)]  # noqa: E731
    return Sampling(
        torch.randint(-(2**62), 2**62, (rows,), generator=pick),
        one_of([0.0, 0.3, 0.7, 1.0, 1.7]),
        one_of([0, 0, 1, 3, 50]).int(),
        one_of([1.0, 1.0, 0.95, 0.6, 0.05]),
        one_of([0.0, 0.0, 0.02, 0.3]),
    )


def filtered_softmax(z: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row's distribution by a plain loop over sorted tokens, in f64: an independent statement of the filters."""
    p = (z.double() / temperature).softmax(-1)
    keep = torch.ones_like(p, dtype=torch.bool)
    if 0 < top_k < len(z):
        keep &= z >= z.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        left = p * keep
        keep &= torch.stack([left[z > value].sum() < top_p * left.sum() for value in z])
    if min_p > 0:
        keep &= p >= min_p * p.max()
    return p * keep / (p * keep).sum()


def chi_square_ok(counts: Tensor, p: Tensor) -> bool:
    """Whether counts agree with p at level 1e-4, rare cells pooled; a count where p is 0 never agrees."""
    return p_value(counts.flatten(), p.double().flatten()) >= 1e-4


def wrong_rows(logits: torch.Tensor, positions: torch.Tensor, sampling: Sampling) -> list[tuple[tuple, type]]:
    """(arguments, error) of an op of rows of logits, its three rows each time wrong in one thing."""
    return [
        ((logits.double(), positions, sampling), TypeError),
        ((logits[0], positions, sampling), ValueError),
        ((logits[:, :0], positions, sampling), ValueError),
        ((logits, positions.int(), sampling), TypeError),
        ((logits, positions[:2], sampling), ValueError),
        ((logits, positions, Sampling.of(2)), ValueError),
        ((logits, positions, tuple(sampling)), TypeError),
    ]
