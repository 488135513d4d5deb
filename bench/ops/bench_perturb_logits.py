"""perturb_logits against PyTorch: exponential noise on the logits, after a sorted top-p where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from beagle_kernels import Sampling, choose_tokens, perturb_logits
from bench.registry import DTYPES, SHAPES, Case, drive, label, parameters


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if size == "scaling":
        return
    for vocab, rows in [(128256, rows) for rows in (1, 60)] if size == "full" else SHAPES[size]:
        z = torch.randn(rows, vocab, device=device)
        for dtype in DTYPES[size]:
            yield from of_logits(z.to(dtype), torch.arange(rows, device=device))


def of_logits(z: torch.Tensor, positions: torch.Tensor) -> Iterator[Case]:
    (rows, vocab), device = z.shape, z.device.type
    shape = f"{rows} x {vocab} {str(z.dtype)[6:]}"
    work = {"byte": float(z.numel() * (z.element_size() + 4))}
    common: dict[str, Any] = {"device": device, "work": work, "rounds": 9}

    def noisy(logits: torch.Tensor) -> torch.Tensor:
        return logits - torch.empty(z.shape, device=device).exponential_().log()

    def cut(logits: torch.Tensor, p: float = 0.9) -> torch.Tensor:
        probability, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = probability.cumsum(-1) - probability >= p
        return logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), -torch.inf)

    for name, p, eager in (
        ("sampled", 1.0, lambda: noisy(z.float())),
        ("top-p", 0.9, lambda: noisy(cut(z.float()))),
    ):
        sampling = Sampling.of(rows, 0, 1.0, 0, p, device=device)

        def check(sampling: Sampling = sampling) -> None:
            values, _ = perturb_logits(z, positions, sampling)
            assert values.argmax(-1).equal(choose_tokens(z, positions, sampling)[0]), "perturb_logits is wrong"

        yield Case(
            f"perturb_logits {name} {shape}",
            {"beagle": lambda sampling=sampling: perturb_logits(z, positions, sampling), "PyTorch": eager},
            check,
            **common,
        )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_perturb_logits(benchmark, case, peer):
    drive(benchmark, case, peer)
