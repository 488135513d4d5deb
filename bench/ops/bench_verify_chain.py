"""verify_chain against the usual composition (softmax, gather, residual, multinomial) and FlashInfer's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import Sampling, verify_chain
from bench.peers import flashinfer, or_reason
from bench.registry import Case, drive, label, parameters, same_as_truth


def composition(target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling at temperature 1, as engines write it."""
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    ratio = (p[:, :-1].gather(2, tokens[..., None]) / q.gather(2, tokens[..., None]))[..., 0]
    count = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
    row, last = torch.arange(len(p), device=p.device), count.clamp(max=q.shape[1] - 1)
    more = (count < q.shape[1]).float()[:, None]
    return count, torch.multinomial((p[row, count] - more * q[row, last]).clamp(min=0), 1)


SHAPES = {
    # size -> (batch, vocabulary, dtype)
    "tiny": [(2, 300, torch.float32)],
    "small": [(1, vocab, dtype) for vocab in (49152, 128256) for dtype in (torch.float32, torch.bfloat16)],
    "full": [(batch, 128256, torch.bfloat16) for batch in (1, 8, 64)],
    "scaling": [],
}
DRAFTED = 5


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for batch, vocab, dtype in SHAPES[size]:
        target = torch.randn(batch, DRAFTED + 1, vocab, device=device).to(dtype)
        draft = (target[:, :DRAFTED].float() + 0.3 * torch.randn(batch, DRAFTED, vocab, device=device)).to(dtype)
        tokens = torch.multinomial(draft.float().softmax(-1).flatten(0, 1), 1).view(batch, DRAFTED)
        for rule in ("token", "block"):
            yield of_logits(target, draft, tokens, rule)


def of_logits(target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, rule: str) -> Case:
    batch, device = len(tokens), tokens.device.type
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    args = (target, draft, tokens, positions, Sampling.of(batch, 0, 1.0, device=device), rule)
    peers: dict = {"beagle": lambda: verify_chain(*args)}
    if rule == "block":
        peers["PyTorch (f64 reference)"] = lambda: verify_chain(*args, backend="reference")
    else:
        peers["softmax + gather"] = lambda: composition(target, draft, tokens)
        kernel = or_reason(flashinfer.why_not(device), flashinfer.verify_chain)
        peers["FlashInfer"] = kernel if isinstance(kernel, str) else lambda: kernel(target, draft, tokens)
    work = {"byte": float((target.numel() + draft.numel()) * target.element_size())}
    name = f"verify_chain {rule} {batch} x {tokens.shape[1]} x {target.shape[2]} {str(target.dtype)[6:]}"
    return Case(name, peers, lambda: same_as_truth(verify_chain, *args), rounds=9, device=device, work=work)


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_verify_chain(benchmark, case, peer):
    drive(benchmark, case, peer)
