"""top_candidates, a level of the draft's tree, against PyTorch's log_softmax and topk, with noise and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import Sampling, top_candidates
from bench.registry import DTYPES, Case, drive, label, moved, parameters

SHAPES = {
    # size -> (rows, the draft's vocabulary, k): a level of a small tree and of the default one
    "tiny": [(3, 500, 4)],
    "small": [(4, 8192, 4), (10, 32768, 10), (10, 128256, 10)],
    "full": [(10, 32768, 10), (80, 32768, 10), (10, 128256, 10)],
    "scaling": [],
}


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for rows, vocab, k in SHAPES[size]:
        z = torch.randn(rows, vocab, device=device)
        for dtype in DTYPES[size]:
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                yield of_logits(name, z.to(dtype), k, Sampling.of(rows, 0, temperature, device=device))


def of_logits(name: str, z: torch.Tensor, k: int, sampling: Sampling) -> Case:
    (rows, vocab), device = z.shape, z.device.type
    positions = torch.arange(rows, device=device)

    def check() -> None:
        """The same tokens as the reference; scores to the rounding of a sum over the vocabulary."""
        args = (z, k, positions, sampling)
        (tokens, scores), truth = top_candidates(*args), top_candidates(*moved(args, "cpu"), backend="reference")
        assert torch.equal(tokens.cpu(), truth[0]), "top_candidates is wrong"
        torch.testing.assert_close(scores.cpu(), truth[1], rtol=1e-5, atol=1e-5)

    def composed() -> tuple[torch.Tensor, torch.Tensor]:
        full = z.float()
        if name == "sampled":
            full = full - torch.empty(z.shape, device=device).exponential_().log()
        return full.log_softmax(-1).topk(k)

    return Case(
        f"top_candidates {name} {rows} x {vocab}, {k} best, {str(z.dtype)[6:]}",
        {
            "beagle": lambda: top_candidates(z, k, positions, sampling),
            "log_softmax + topk": composed,
            "amax": lambda: z.amax(-1),
        },
        check,
        bounds=("amax",),
        rounds=9,
        device=device,
        work={"byte": float(z.numel() * z.element_size())},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_top_candidates(benchmark, case, peer):
    drive(benchmark, case, peer)
