"""choose_tokens against PyTorch: argmax, softmax + multinomial, the same perturbed argmax, and sorted top-p."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import Sampling, choose_tokens
from bench.registry import SHAPES, Case, drive, label, parameters, same_as_truth


def top_p(z: torch.Tensor, p: float) -> torch.Tensor:
    """Softmax, sort, cut, multinomial: the usual composition."""
    probability, order = z.float().softmax(-1).sort(dim=-1, descending=True)
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= p, 0)
    return order.gather(1, torch.multinomial(probability, 1))


def cases(device: str = "cpu") -> Iterator[Case]:
    dtypes = torch.float32, torch.bfloat16
    shapes = [(*shape, dtype) for shape in SHAPES for dtype in dtypes]
    if device == "cuda":
        shapes = [(128256, rows, torch.bfloat16) for rows in (1, 60, 512)]
    for vocab, rows, dtype in shapes:
        z = torch.randn(rows, vocab, device=device).to(dtype)
        yield from of_logits(f"{rows} x {vocab} {str(dtype)[6:]}", z, torch.arange(rows, device=device))


def of_logits(shape: str, z: torch.Tensor, positions: torch.Tensor) -> Iterator[Case]:
    rows, device = len(z), z.device.type
    common = {"device": device, "work": {"byte": float(z.numel() * z.element_size())}}
    greedy, warm, nucleus = (
        Sampling.of(rows, 0, temperature, 0, p, device=device)
        for temperature, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
    )

    def ours(sampling: Sampling):
        return lambda: choose_tokens(z, positions, sampling)

    noise = lambda: -torch.empty(z.shape, device=device).exponential_().log()  # noqa: E731
    yield Case(
        f"choose_tokens greedy {shape}",
        {"beagle": ours(greedy), "argmax": lambda: z.argmax(-1), "amax": lambda: z.amax(-1)},
        lambda: same_as_truth(choose_tokens, z, positions, greedy),
        bounds=("amax",),
        **common,
    )
    yield Case(
        f"choose_tokens sampled {shape}",
        {
            "beagle": ours(warm),
            "softmax + multinomial": lambda: torch.multinomial(z.float().softmax(-1), 1),
            "perturbed argmax": lambda: (z.float() + noise()).argmax(-1),
        },
        lambda: same_as_truth(choose_tokens, z, positions, warm),
        rounds=5,
        **common,
    )
    yield Case(
        f"choose_tokens top-p {shape}",
        {"beagle": ours(nucleus), "softmax + sort + multinomial": lambda: top_p(z, 0.9)},
        lambda: same_as_truth(choose_tokens, z, positions, nucleus),
        rounds=3,
        **common,
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_choose_tokens(benchmark, case, peer):
    drive(benchmark, case, peer)
