"""Logits as the text before each node changes them: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import implementation
from ..types import accumulation


@implementation("adjust_logits", "reference")
def adjust_logits(
    logits: Tensor,
    paths: Tensor,
    text: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    added: Tensor | None,
    first: Tensor | None,
    phrases: Tensor,
    phrase_bias: Tensor,
    phrase_rows: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    ngram: Tensor,
    token_ids: Tensor | None,
    allowed: Tensor | None,
) -> Tensor:
    width, dtype = logits.shape[2], accumulation(logits.dtype)
    ids = torch.arange(width, device=logits.device) if token_ids is None else token_ids
    lengths = lengths.long().clamp(0, text.shape[1])
    prompts = torch.minimum(prompts.long().clamp(min=0), lengths)[:, None]
    prefix, total = prefixes(paths, text, lengths)

    z = logits.to(dtype)
    if added is not None or len(phrases):
        z = z + bias(prefix, total, ids, added, phrases, phrase_bias, phrase_rows, dtype)

    place = columns(prefix, ids)
    index = torch.arange(prefix.shape[2], device=logits.device)
    within = (index < total[..., None]).to(dtype)
    seen = spread(place, within, width) > 0
    count = spread(place, within * (index >= prompts)[:, None], width)
    r, f, p = (field[:, None, None].to(dtype) for field in (repetition, frequency, presence))
    given = z != -torch.inf
    z = torch.where(seen & given, torch.where(z < 0, z * r, z / r), z)
    z = torch.where((count > 0) & given, z - f * count - p, z)

    banned = repeated(prefix, total, place, ngram, width)
    if first is not None:
        banned |= (total - prompts)[..., None] < first[:, ids.clamp(0, first.shape[1] - 1)][:, None]
    if allowed is not None:
        bit = ids.clamp(0, 32 * allowed.shape[2] - 1)
        banned |= (allowed[..., bit // 32] >> (bit % 32).int() & 1) == 0
    return z.masked_fill(banned, -torch.inf).contiguous()


def prefixes(paths: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What each node sees, [B, N, S + P + 1] from the left and -1 behind its end, and how many tokens [B, N] it is."""
    (batch, nodes, room), slots = paths.shape, text.shape[1]
    depth = (paths >= 0).cummax(2).values.sum(2) if room else paths.new_zeros(batch, nodes)
    at = torch.arange(slots + room + 1, device=text.device)
    below = at - lengths[:, None, None] + room - depth[..., None]
    path = pad(paths, (0, 1), value=-1).gather(2, below.clamp(0, room))
    committed = pad(text, (0, room + 1), value=-1)[:, None].expand(-1, nodes, -1)
    return torch.where(at < lengths[:, None, None], committed, path), lengths[:, None] + depth


def columns(tokens: Tensor, ids: Tensor) -> Tensor:
    """The column of each token among the ascending ids; len(ids) for one that has none."""
    at = torch.searchsorted(ids.contiguous(), tokens.contiguous()).clamp(max=len(ids) - 1)
    return torch.where(ids[at] == tokens, at, len(ids))


def spread(place: Tensor, amounts: Tensor, width: int) -> Tensor:
    """The amounts [B, N, T] summed by their columns: [B, N, width]."""
    sums = amounts.new_zeros(*place.shape[:2], width + 1)
    return sums.scatter_add_(2, place, amounts.expand(place.shape))[..., :width]


def bias(
    prefix: Tensor,
    total: Tensor,
    ids: Tensor,
    added: Tensor | None,
    phrases: Tensor,
    phrase_bias: Tensor,
    phrase_rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What is added to each logit: `added`, then phrase after phrase."""
    (batch, nodes), row = total.shape, torch.arange(len(total), device=ids.device)[:, None]
    amount = torch.zeros(batch, nodes, len(ids) + 1, dtype=dtype, device=ids.device)
    if added is not None:
        amount[..., :-1] = added[:, ids.clamp(0, added.shape[1] - 1)][:, None]
    if not phrases.shape[1]:
        return amount[..., :-1]
    ends, back = columns(phrases[:, -1], ids), torch.arange(1 - phrases.shape[1], 0, device=ids.device)
    at = total[..., None] + back
    tail = prefix.gather(2, at.clamp(min=0))
    begun = (phrases >= 0).cummax(1).values
    for k in range(len(phrases)):
        equal = ~begun[k, :-1] | (tail == phrases[k, :-1]) & (at >= 0)
        row_matches = (phrase_rows[k] == -1) | (phrase_rows[k] == row)
        match = equal.all(2) & row_matches & begun[k, -1]
        share = torch.where(match, phrase_bias[k].to(dtype), 0.0)[..., None]
        amount.scatter_add_(2, ends[k].expand_as(share), share)
    return amount[..., :-1]


def repeated(prefix: Tensor, total: Tensor, place: Tensor, ngram: Tensor, width: int) -> Tensor:
    """Which columns [B, N, width] would complete an n-gram that the prefix has; row by row, as n is."""
    banned = torch.zeros(*total.shape, width + 1, dtype=torch.bool, device=total.device)
    for b, n in enumerate(ngram.tolist()):
        if not 0 < n <= prefix.shape[2]:
            continue
        end = total[b, :, None]
        key = prefix[b].gather(1, (end + torch.arange(1 - n, 0, device=end.device)).clamp(min=0))
        windows = prefix[b].unfold(1, n, 1)
        whole = torch.arange(n, prefix.shape[2] + 1, device=end.device) <= end
        match = (windows[..., :-1] == key[:, None]).all(2) & whole
        banned[b].scatter_(1, torch.where(match, place[b, :, n - 1 :], width), True)
    return banned[..., :-1]
