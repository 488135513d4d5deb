"""lookup against the search of transformers' prompt lookup, and one over unfolded windows in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from beagle_kernels import lookup
from bench.peers import or_reason, prompt_lookup
from bench.registry import Case, drive, label, parameters

SHAPES = {
    # size -> (batch, tokens)
    "tiny": [(2, 300)],
    "small": [(batch, size) for batch in (1, 8) for size in (300, 4096, 32768)],
    "full": [(batch, size) for batch in (1, 8) for size in (300, 4096, 32768)],
    "scaling": [],
}
COUNT, LONGEST = 10, 16
PLANTED = 12
"""Tokens of the end that recur, a quarter into the text: fewer than LONGEST, so that no search may stop there."""


def texts(batch: int, size: int) -> Tensor:
    """Tokens as frequent as words are, the r-th most frequent in proportion to 1 / r."""
    share = 1.0 / torch.arange(1, 20001)
    text = torch.multinomial(share, batch * size, replacement=True).view(batch, size)
    text[:, -PLANTED:] = text[:, size // 4 : size // 4 + PLANTED]
    return text


def unfolded(text: Tensor) -> tuple[Tensor, Tensor]:
    """The same for whole texts: every end's window compared with the last one."""
    size = text.shape[1]
    windows = torch.nn.functional.pad(text, (LONGEST, 0), value=-1).unfold(1, LONGEST, 1)[:, 1:size]
    same = (windows == text[:, None, -LONGEST:]).flip(-1)
    matched, end = (same.long().cumprod(-1).sum(-1) * size + torch.arange(size - 1, device=text.device)).max(1)
    matched = matched // size
    place = end[:, None] + 1 + torch.arange(COUNT, device=text.device) % (size - 1 - end[:, None])
    return torch.where(matched[:, None] > 0, text.gather(1, place), -1), matched.int()


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for batch, tokens in SHAPES[size]:
        yield of_texts(texts(batch, tokens).to(device))


def of_texts(text: Tensor) -> Case:
    batch, size = text.shape
    lengths = torch.full((batch,), size, dtype=torch.int32, device=text.device)

    def ours(backend: str = "auto") -> tuple[Tensor, Tensor]:
        return lookup(text, lengths, COUNT, longest=LONGEST, backend=backend)

    def by_transformers() -> Callable:
        search = prompt_lookup.searcher(COUNT, LONGEST, size)
        return lambda: (torch.stack([search(row[None]) for row in text]),)

    peers: dict[str, Callable | str] = {
        "beagle": ours,
        "transformers": or_reason(prompt_lookup.why_not(text.device.type), by_transformers),
        "PyTorch, unfold": lambda: unfolded(text),
    }

    def check() -> None:
        for have, want in zip(ours(), ours("reference")):
            assert torch.equal(have, want), "lookup is wrong"

    def check_peer(name: str) -> None:
        peer = peers[name]
        assert not isinstance(peer, str), peer
        for have, want in zip(peer(), ours()):
            assert torch.equal(have, want), f"{name} found something else"

    return Case(
        f"lookup {batch} x {size} tokens",
        peers,
        check,
        rounds=30,
        device=text.device.type,
        check_peer=check_peer,
        data="tokens as frequent as words",
        # every token is read once
        work={"byte": float(text.nbytes)},
        series="lookup",
        at={"batch": batch, "tokens": size},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_lookup(benchmark, case, peer):
    drive(benchmark, case, peer)
