"""Random and odd input of adjust_logits, and the plain loop that says what comes of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beagle_kernels import Adjustments

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = (-7, -1, 10**12, 2**31)
"""Tokens that are none of a vocabulary's, as a picture's place in a text may be."""


def bits_of(allowed: Tensor) -> Tensor:
    """Bools [..., V] as words of 32 bits, int32 [..., ceil(V / 32)]."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (padded.long() << torch.arange(32)).sum(-1).to(torch.int32)


def settings(pick: torch.Generator, batch: int, vocab: int, few: int) -> Adjustments:
    """Each row's own, some of them off; phrases of 1 to 4 tokens, for one row, all, or none."""

    def some(*values: float, dtype=torch.float32) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (batch,), generator=pick)].to(dtype)

    def now_and_then(table: Tensor) -> Tensor | None:
        return table if torch.rand((), generator=pick) < 0.6 else None

    count, longest = (0, 3, 9)[int(torch.randint(3, (), generator=pick))], 4
    phrases = torch.randint(few, (count, longest), generator=pick)
    sizes = torch.randint(1, longest + 1, (count, 1), generator=pick)
    added = torch.randn(batch, vocab, generator=pick)
    added[:, torch.randint(vocab, (3,), generator=pick)] = -INF
    return Adjustments(
        now_and_then(added),
        now_and_then(torch.randint(-3, 12, (batch, vocab), generator=pick, dtype=torch.int32)),
        phrases.masked_fill(torch.arange(longest) < longest - sizes, -1),
        torch.where(torch.rand(count, generator=pick) < 0.3, -INF, torch.randn(count, generator=pick)),
        torch.randint(-1, batch + 1, (count,), generator=pick, dtype=torch.int32),
        some(1.0, 1.3, 0.7),
        some(0.0, 0.4, -0.2),
        some(0.0, 0.6, -0.1),
        some(0, 1, 2, 3, 40, dtype=torch.int32),
    )


def case(seed: int) -> tuple[tuple, dict]:
    """What adjust_logits takes: few different tokens, so that much repeats, a text that may be empty, paths that repeat
    tokens, NaN and infinities, views, and now and then a reduced vocabulary."""
    pick = torch.Generator().manual_seed(seed)
    batch, nodes, slots, room = [(1, 1, 9, 0), (3, 4, 20, 5), (2, 7, 0, 3), (2, 1, 300, 1), (5, 3, 33, 9)][seed % 5]
    vocab = (1, 31, 64, 1030, 5000)[seed // 5 % 5]
    few, ids = min(vocab, 7), None
    if seed % 4 == 3:
        ids = torch.randperm(vocab, generator=pick)[: vocab // 2 + 1].sort().values
    width = vocab if ids is None else len(ids)
    z = torch.randn(batch, nodes, width + 3, generator=pick) * 3
    for value in (-INF, INF, math.nan):
        z[torch.rand(z.shape, generator=pick) < 0.05] = value
    z = z.to(DTYPES[seed % 3])[..., 3:] if seed % 2 else z[..., 3:].transpose(0, 2).contiguous().transpose(0, 2)
    text, paths = (torch.randint(few, shape, generator=pick) for shape in ((batch, slots), (batch, nodes, room)))
    text = torch.where(torch.rand(text.shape, generator=pick) < 0.1, torch.tensor(ODD)[text % len(ODD)], text)
    depth = torch.randint(room + 1, (batch, nodes, 1), generator=pick)
    paths = paths.masked_fill(torch.arange(room) < room - depth, -1)
    lengths = torch.randint(slots + 1, (batch,), generator=pick, dtype=torch.int32)
    prompts = (torch.rand(batch, generator=pick) * (lengths + 1)).int()
    allowed = bits_of(torch.rand(batch, nodes, vocab, generator=pick) < 0.7) if seed % 3 == 1 else None
    given = settings(pick, batch, vocab, few)
    return (z, paths, text, lengths, prompts, given), {"token_ids": ids, "allowed": allowed}


def by_loops(z: Tensor, paths, text, lengths, prompts, given: Adjustments, token_ids=None, allowed=None) -> Tensor:
    """Node by node and token by token, in Python, each number rounded to f32 where f32 rounds."""
    out = z.float().clone()
    ids = list(range(z.shape[2])) if token_ids is None else token_ids.tolist()
    for b in range(z.shape[0]):
        committed = text[b, : int(lengths[b])].tolist()
        for n in range(z.shape[1]):
            prefix = committed + [token for token in paths[b, n].tolist() if token >= 0]
            new = prefix[int(prompts[b]) :]
            for i, v in enumerate(ids):
                out[b, n, i] = of_token(out[b, n, i], b, v, prefix, new, given)
                if allowed is not None and not int(allowed[b, n, v // 32]) >> v % 32 & 1:
                    out[b, n, i] = -INF
    return out


def of_token(z: Tensor, b: int, v: int, prefix: list[int], new: list[int], given: Adjustments) -> Tensor:
    bias = torch.zeros(()) if given.added is None else given.added[b, v].clone()
    for phrase, amount, row in zip(given.phrases.tolist(), given.phrase_bias, given.phrase_rows.tolist()):
        phrase = [token for token in phrase if token >= 0]
        begins = len(prefix) + 1 - len(phrase)
        if row in (-1, b) and begins >= 0 and [*prefix[begins:], v] == phrase:
            bias = bias + amount
    z = z + bias
    if v in prefix and z != -INF:
        z = z * given.repetition[b] if z < 0 else z / given.repetition[b]
        if count := new.count(v):
            z = z - given.frequency[b] * count
            z = z - given.presence[b]
    soon = given.first is not None and len(new) < int(given.first[b, v])
    return torch.tensor(-INF) if soon or completes(prefix, v, int(given.ngram[b])) else z


def completes(prefix: list[int], v: int, n: int) -> bool:
    """Whether v would complete an n-gram that the prefix has."""
    if n == 0 or len(prefix) + 1 < n:
        return False
    new = [*prefix, v][len(prefix) + 1 - n :]
    return any(prefix[i : i + n] == new for i in range(len(prefix) - n + 1))
