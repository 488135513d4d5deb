"""verify_chain against the usual composition: two softmaxes, gathers, a residual and multinomial."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import Sampling, verify_chain
from bench.registry import Case, drive, label, parameters, same_as_truth


def composition(target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling at temperature 1, as engines write it."""
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    ratio = (p[:, :-1].gather(2, tokens[..., None]) / q.gather(2, tokens[..., None]))[..., 0]
    count = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
    row, last = torch.arange(len(p), device=p.device), count.clamp(max=q.shape[1] - 1)
    more = (count < q.shape[1]).float()[:, None]
    return count, torch.multinomial((p[row, count] - more * q[row, last]).clamp(min=0), 1)


def cases(device: str = "cpu") -> Iterator[Case]:
    shapes = [(1, vocab, dtype) for vocab in (49152, 128256) for dtype in (torch.float32, torch.bfloat16)]
    if device == "cuda":
        shapes = [(batch, 128256, torch.bfloat16) for batch in (1, 8)]
    for batch, vocab, dtype in shapes:
        target = torch.randn(batch, 6, vocab, device=device).to(dtype)
        draft = (target[:, :5].float() + 0.3 * torch.randn(batch, 5, vocab, device=device)).to(dtype)
        tokens = torch.multinomial(draft.float().softmax(-1).flatten(0, 1), 1).view(batch, 5)
        for rule in ("token", "block"):
            yield of_logits(target, draft, tokens, rule)


def of_logits(target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, rule: str) -> Case:
    batch, device = len(tokens), tokens.device.type
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    args = (target, draft, tokens, positions, Sampling.of(batch, 0, 1.0, device=device), rule)
    peers = {"beagle": lambda: verify_chain(*args), "softmax + gather": lambda: composition(target, draft, tokens)}
    if rule == "block":
        peers.pop("softmax + gather")
        peers["PyTorch (f64 reference)"] = lambda: verify_chain(*args, backend="reference")
    work = {"byte": float((target.numel() + draft.numel()) * target.element_size())}
    name = f"verify_chain {rule} {batch} x {tokens.shape[1]} x {target.shape[2]} {str(target.dtype)[6:]}"
    return Case(name, peers, lambda: same_as_truth(verify_chain, *args), rounds=9, device=device, work=work)


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_verify_chain(benchmark, case, peer):
    drive(benchmark, case, peer)
