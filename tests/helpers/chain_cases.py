"""A tiny Markov model, a draft of it, and rounds of verify_chain over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beagle_kernels import Sampling, choose_tokens, verify_chain


def filtered(table: Tensor, temperature: float, top_k: int = 0) -> Tensor:
    """Rows of probabilities of a table of logits."""
    if top_k:
        table = table.masked_fill(table < table.sort(-1, descending=True).values[:, top_k - 1 : top_k], -torch.inf)
    return (table.double() / temperature).softmax(-1)


def draft_chain(table: Tensor, last: Tensor, steps: int, positions: Tensor, sampling: Sampling):
    """Tokens [B, K] drawn from table with the draft's own noise, and their logits [B, K, V]."""
    tokens, logits = [], []
    for i in range(steps):
        logits.append(table[last])
        last, _ = choose_tokens(logits[-1], positions + i, sampling, stream=1, rounds=positions)
        tokens.append(last)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def decode(
    target: Tensor,
    draft: Tensor,
    start: int,
    length: int,
    steps: int,
    sampling: Sampling,
    rule: str,
    verify: Callable = verify_chain,
) -> tuple[Tensor, Tensor]:
    """Each row's first `length` tokens after `start`, by rounds of its own, and the number of rounds [B]."""
    rows = len(sampling.seed)
    text = torch.zeros(rows, length + steps + 1, dtype=torch.long)
    last, done = torch.full((rows,), start), torch.zeros(rows, dtype=torch.long)
    rounds = torch.zeros(rows, dtype=torch.long)
    while (done < length).any():
        live = (done < length).nonzero()[:, 0]
        at, own = done[live] + 1, Sampling(*(field[live] for field in sampling))
        tokens, draft_logits = draft_chain(draft, last[live], steps, at, own)
        target_logits = target[torch.cat((last[live, None], tokens), 1)]
        verdict = verify(target_logits, draft_logits, tokens, at, own, rule)
        count = verdict.num_accepted.long()
        emitted = torch.cat((tokens, tokens[:, :1]), 1)
        emitted = emitted.scatter(1, count[:, None], verdict.next_token[:, None])
        text[live[:, None], done[live, None] + torch.arange(steps + 1)] = emitted
        last[live], done[live] = verdict.next_token, done[live] + count + 1
        rounds[live] += 1
    return text[:, :length], rounds
