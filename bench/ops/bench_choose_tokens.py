"""choose_tokens against PyTorch (argmax, multinomial, the same perturbed argmax, sorted top-p) and FlashInfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from beagle_kernels import Sampling, choose_tokens
from bench.peers import flashinfer, or_reason
from bench.registry import DTYPES, SHAPES, Case, drive, label, parameters, same_as_truth


def top_p(z: torch.Tensor, p: float) -> torch.Tensor:
    """Softmax, sort, cut, multinomial: the usual composition."""
    probability, order = z.float().softmax(-1).sort(dim=-1, descending=True)
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= p, 0)
    return order.gather(1, torch.multinomial(probability, 1))


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if size == "scaling":
        return  # verify_tree's plots show it
    for vocab, rows in [(128256, rows) for rows in (1, 60, 512)] if size == "full" else SHAPES[size]:
        z = torch.randn(rows, vocab, device=device)
        for dtype in DTYPES[size]:
            yield from of_logits(z.to(dtype), torch.arange(rows, device=device))


def of_logits(z: torch.Tensor, positions: torch.Tensor) -> Iterator[Case]:
    (rows, vocab), device = z.shape, z.device.type
    shape = f"{rows} x {vocab} {str(z.dtype)[6:]}"
    common: dict[str, Any] = {"device": device, "work": {"byte": float(z.numel() * z.element_size())}}
    greedy, warm, nucleus = (
        Sampling.of(rows, 0, temperature, 0, p, device=device)
        for temperature, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
    )

    def ours(sampling: Sampling):
        return lambda: choose_tokens(z, positions, sampling)

    def peer(make) -> Callable | str:
        found = or_reason(flashinfer.why_not(device), make)
        return found if isinstance(found, str) else lambda: found(z)

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
            "FlashInfer": peer(flashinfer.sample),
        },
        lambda: same_as_truth(choose_tokens, z, positions, warm),
        rounds=15,
        **common,
    )
    yield Case(
        f"choose_tokens top-p {shape}",
        {
            "beagle": ours(nucleus),
            "softmax + sort + multinomial": lambda: top_p(z, 0.9),
            "FlashInfer": peer(lambda: flashinfer.sample_top_p(0.9)),
        },
        lambda: same_as_truth(choose_tokens, z, positions, nucleus),
        rounds=9,
        **common,
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_choose_tokens(benchmark, case, peer):
    drive(benchmark, case, peer)
