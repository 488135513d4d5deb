"""What the sampling ops share: cleaned logits, filter cuts and perturbed logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import STATUS_NAN, STATUS_NO_FINITE
from .philox import gumbel

LOG2_E = 1.4426950408889634
EXP2 = torch.tensor(
    (0.001325328, 0.009667583, 0.05550751, 0.24022356, 0.693147, 0.99999994), dtype=torch.float32, device="cpu"
).tolist()
"""2^f on [-1/2, 1/2], highest power first; every backend evaluates it in f32 by Horner's rule with fused adds."""


def clean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, V] as f32, NaN as -inf, +inf as the largest finite number, and status [R] int32.

    A row without a number becomes the point mass on token 0.
    """
    z = logits.float()
    status = torch.zeros(z.shape[0], dtype=torch.int32, device=z.device)
    if z.amax(-1).isfinite().all():
        return z, status
    nan = z.isnan()
    z = torch.where(nan, -torch.inf, z).clamp(max=torch.finfo(torch.float32).max)
    empty = z.amax(-1) == -torch.inf
    z[:, 0] = torch.where(empty, 0.0, z[:, 0])
    return z, nan.any(-1).int() * STATUS_NAN + empty.int() * STATUS_NO_FINITE


def fixed_point(d: Tensor, scale: Tensor) -> Tensor:
    """2^(d scale) of f32 d <= 0 as int64 in units of 2^-30: sums do not depend on their order, nor on the backend.

    Products are fused with the sums they enter: what f64 gives, rounded to f32.
    """
    d = torch.maximum(d, -31 / scale)
    exact = d.double() * scale.double()
    whole = exact.round()
    fraction = (exact - whole).float().double()
    power = torch.full_like(d, EXP2[0])
    for coefficient in EXP2[1:]:
        power = (power.double() * fraction + coefficient).float()
    return (power * 2.0**30).long() >> -whole.long()


def filter_cut(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit [R, 1] that top-k, then top-p, then min-p keep: each filter is a threshold on z.

    top-k: the k-th largest, so ties at the boundary stay. top-p: the least z whose mass strictly above is below
    top_p of what top-k left. min-p: (z - z_max) log2(e) / T >= log2(min_p).
    """
    vocab = z.shape[1]
    top = z.amax(-1, keepdim=True)
    scale = (1 / temperature * LOG2_E).clamp(max=torch.finfo(torch.float32).max)[:, None]
    cut = torch.full_like(top, -torch.inf)
    by_k = (top_k > 0) & (top_k < vocab)
    by_p = top_p < 1
    if by_p.any():
        ordered = z.sort(dim=-1, descending=True).values
    elif by_k.any():
        ordered = z.topk(int(top_k[by_k].max()), dim=-1).values
    if by_k.any():
        kth = ordered.gather(1, torch.where(by_k, top_k - 1, 0).long()[:, None])
        cut = torch.where(by_k[:, None], kth, cut)
    if by_p.any():
        mass = torch.where(ordered >= cut, fixed_point(ordered - top, scale), 0)
        above = mass.cumsum(-1) - mass
        last = (above.double() < top_p.double()[:, None] * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True) - 1
        cut = torch.where(by_p[:, None], torch.maximum(cut, ordered.gather(1, last.clamp(min=0))), cut)
    if (min_p > 0).any():
        floor = min_p.double().log2().float()[:, None]
        least = torch.where((z - top) * scale >= floor, z, torch.inf).amin(-1, keepdim=True)
        cut = torch.maximum(cut, least)
    return cut


def perturb(
    z: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    penalty: float,
    stream: int = 0,
    rounds: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """z + T g in f32, less penalty x T where the filters would drop; rows at temperature 0 come back untouched.

    Only the rows that need noise, a sort or a copy pay for it.
    """
    rows = (temperature > 0).nonzero().squeeze(1)
    if not len(rows):
        return z
    t, k, p, m = (setting[rows] for setting in (temperature, top_k, top_p, min_p))
    noise = gumbel(seed[rows], positions[rows], z.shape[1], stream, None if rounds is None else rounds[rows], token_ids)
    kept = z[rows]
    value = kept + t[:, None] * noise
    if ((k > 0) | (p < 1) | (m > 0)).any():
        cut = filter_cut(kept, t, k, p, m)
        value = torch.where(kept >= cut, value, value - penalty * t[:, None])
    return z.index_copy(0, rows, value)
