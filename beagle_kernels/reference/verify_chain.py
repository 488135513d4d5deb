"""Rejection sampling of a chain in f64: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..types import STATUS_BAD_TREE
from .philox import STREAM_ACCEPT, STREAM_RESIDUAL, gumbel, uniform
from .sampling import clean, filter_cut


@implementation("verify_chain", "reference")
def verify_chain(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_tokens: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    rule: str = "token",
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, steps = draft_tokens.shape
    vocab, device = target_logits.shape[2], draft_tokens.device
    settings = (temperature, top_k, top_p, min_p)
    p, flags = distribution(target_logits, *settings)
    q, draft_flags = distribution(draft_logits, *settings)
    status = torch.zeros(batch, dtype=torch.int32, device=device)
    for flag in (*flags.unbind(1), *draft_flags.unbind(1)):
        status = status | flag
    if token_ids is not None:
        q = q.new_zeros(batch, steps, vocab).index_copy(2, token_ids, q)
    known = torch.arange(vocab, device=device) if token_ids is None else token_ids
    valid = torch.isin(draft_tokens, known).all(1)

    drafted = draft_tokens.clamp(0, vocab - 1)[:, :, None]
    p_drafted, q_drafted = p[:, :steps].gather(2, drafted)[:, :, 0], q.gather(2, drafted)[:, :, 0]
    at = positions[:, None] + torch.arange(steps, device=device)
    u = uniform(seed[:, None], at, STREAM_ACCEPT, positions[:, None])
    q = torch.cat((q, q.new_zeros(batch, 1, vocab)), 1)
    accept = {"token": accept_tokens, "block": accept_block}[rule]
    count, weight = accept(p, q, p_drafted, q_drafted, u)
    count = torch.where(valid, count, 0)
    weight = torch.where(valid, weight, 1.0)[:, None]

    here = count[:, None, None].expand(-1, -1, vocab)
    p_next, q_next = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]
    residual = (weight * p_next - torch.where(valid[:, None], q_next, 0)).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    noise = gumbel(seed, positions + count, vocab, STREAM_RESIDUAL, positions)
    step = torch.arange(steps + 1, device=device)
    path = torch.where(step <= count[:, None], step, -1).int()
    return path, count.int(), (residual.log() + noise).argmax(-1), status | (~valid).int() * STATUS_BAD_TREE


def distribution(logits: Tensor, *settings: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(filtered(z) / T) in f64 of [B, K, V], one-hot at temperature 0, and status [B, K]."""
    batch, steps, vocab = logits.shape
    if not logits.numel():
        return logits.double(), torch.zeros(batch, steps, dtype=torch.int32, device=logits.device)
    z, status = clean(logits.reshape(-1, vocab))
    temperature, *filters = (setting.repeat_interleave(steps) for setting in settings)
    greedy = (temperature <= 0)[:, None]
    temperature = torch.where(greedy[:, 0], 1, temperature)
    kept = torch.where(z >= filter_cut(z, temperature, *filters), z, -torch.inf)
    kept = (kept - z.amax(-1, keepdim=True)).double() / temperature.double()[:, None]
    one_hot = torch.zeros_like(kept).scatter_(1, z.argmax(-1, keepdim=True), 1)
    return torch.where(greedy, one_hot, kept.softmax(-1)).view(batch, steps, vocab), status.view(batch, steps)


def accept_tokens(p: Tensor, q: Tensor, p_drafted: Tensor, q_drafted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted count [B] and weight 1 of the residual: each token on its own coin, up to the first refusal."""
    count = (u * q_drafted < p_drafted).long().cumprod(1).sum(1)
    return count, torch.ones_like(count, dtype=p.dtype)


def accept_block(p: Tensor, q: Tensor, p_drafted: Tensor, q_drafted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted count [B] and the weight w of the residual there: the longest prefix that passes."""
    steps = u.shape[1]
    weight = torch.ones_like(p[:, 0, 0])
    count, kept = torch.zeros_like(weight, dtype=torch.long), weight
    for i in range(steps):
        weight = (weight * p_drafted[:, i] / q_drafted[:, i]).nan_to_num(0.0, posinf=1.0).clamp(max=1.0)
        surplus = (weight[:, None] * p[:, i + 1] - q[:, i + 1]).clamp(min=0).sum(1)
        passes = u[:, i] * (surplus + 1 - weight) < surplus if i + 1 < steps else u[:, i] < weight
        count, kept = torch.where(passes, i + 1, count), torch.where(passes, weight, kept)
    # after the whole chain the next token comes from p itself, whatever the weight
    return count, kept
