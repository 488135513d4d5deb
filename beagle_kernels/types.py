"""The named tuples that the ops take and return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How each row samples: one value a row, all on the rows' device.

    seed [R] int64; temperature [R] f32, 0 is greedy; top_k [R] int32, 0 is off; top_p [R] f32 in
    (0, 1], 1 is off; min_p [R] f32 in [0, 1], 0 is off. Filters do not apply at temperature 0.
    """

    seed: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(
        cls,
        rows: int,
        seed: int | Tensor = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        *,
        device: torch.device | str | None = None,
    ) -> Sampling:
        """The same settings for `rows` rows; an int seed s means s + r for row r, a tensor [rows] is taken as it is.

        Raises ValueError for a temperature below 0, top_k below 0, top_p outside (0, 1], min_p outside [0, 1], or an
        int seed whose rows leave int64.
        """
        check_sampling(temperature, top_k, top_p, min_p)
        if not isinstance(seed, Tensor):
            if not -(2**63) <= seed <= 2**63 - max(rows, 1):
                raise ValueError(f"seed is {seed} for {rows} rows; allowed: seed + row within -2**63 to 2**63 - 1")
            seed = torch.arange(rows, dtype=torch.int64, device=device) + seed
        elif seed.shape != (rows,):
            raise ValueError(f"seed has shape {tuple(seed.shape)}; allowed: an int or an int64 tensor [{rows}]")
        return cls(
            seed.to(device=device, dtype=torch.int64),
            torch.full((rows,), temperature, dtype=torch.float32, device=device),
            torch.full((rows,), top_k, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, dtype=torch.float32, device=device),
            torch.full((rows,), min_p, dtype=torch.float32, device=device),
        )

    def repeat(self, times: int) -> Sampling:
        """Each row `times` times in a row: [R] -> [R * times]."""
        return Sampling(*(field.repeat_interleave(times) for field in self))


class Adjustments(NamedTuple):
    """What is done to the logits of each row by the text before a token (see adjust_logits), all on one device.

    added [B, V] f32 or None, a bias of each token, -inf never gives it; first [B, V] int32 or None, the number, from 0,
    of the first new token that may be this one; phrases [K, L] int64, padded with -1 on the left, with phrase_bias [K]
    f32 and phrase_rows [K] int32, the row it is for or -1 for all; repetition [B] f32, 1 is off; frequency, presence
    [B] f32 and ngram [B] int32, 0 is off.
    """

    added: Tensor | None
    first: Tensor | None
    phrases: Tensor
    phrase_bias: Tensor
    phrase_rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    ngram: Tensor

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        ngram: int = 0,
        added: Tensor | None = None,
        first: Tensor | None = None,
        phrases: Sequence[tuple[Sequence[int], float] | tuple[Sequence[int], float, int]] = (),
        device: torch.device | str | None = None,
    ) -> Adjustments:
        """The same settings for `batch` rows, all off but those given; added and first [batch, V] are tables. A phrase
        is (tokens, bias), or (tokens, bias, row) for one row alone.

        Raises ValueError for a repetition that is not above 0, numbers that are not finite, ngram below 0, a phrase
        without tokens or with one below 0, a bias that is NaN, or a row that is not there.
        """
        check_adjustments(repetition, frequency, presence, ngram)
        listed = [(list(phrase[0]), float(phrase[1]), phrase[2] if len(phrase) > 2 else -1) for phrase in phrases]
        longest = max((len(tokens) for tokens, _, _ in listed), default=0)
        for tokens, bias, row in listed:
            if not tokens or min(tokens) < 0 or bias != bias or not -1 <= row < batch:
                raise ValueError(
                    f"a phrase is ({tokens}, {bias}, {row}); allowed: one token or more, of 0 or more, a bias that is "
                    f"not NaN, and a row from 0 to {batch - 1}, or -1 for all"
                )
        padded = [[-1] * (longest - len(tokens)) + tokens for tokens, _, _ in listed]
        return cls(
            added if added is None else added.to(device=device, dtype=torch.float32),
            first if first is None else first.to(device=device, dtype=torch.int32),
            torch.tensor(padded, dtype=torch.int64, device=device).view(len(listed), longest),
            torch.tensor([bias for _, bias, _ in listed], dtype=torch.float32, device=device),
            torch.tensor([row for _, _, row in listed], dtype=torch.int32, device=device),
            torch.full((batch,), repetition, dtype=torch.float32, device=device),
            torch.full((batch,), frequency, dtype=torch.float32, device=device),
            torch.full((batch,), presence, dtype=torch.float32, device=device),
            torch.full((batch,), ngram, dtype=torch.int32, device=device),
        )


class Linear(NamedTuple):
    """A linear layer as nn.Linear stores it: weight [N, K], bias [N] or None; scales [N, K / G] of a weight in int8."""

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None


class Norm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) (weight + added), over the last dimension: weight [K]; Gemma's norms add 1."""

    weight: Tensor
    eps: float
    added: float = 0.0


class LayerWeights(NamedTuple):
    """What a decoder layer is made of (see decoder_layer): its linear layers, k and v None where it writes no keys;
    norms, None where there is none; what is between gate and up; the factor of what joins the residual stream."""

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    norm_in: Norm | None = None
    norm_q: Norm | None = None
    norm_k: Norm | None = None
    norm_attended: Norm | None = None
    norm_mlp: Norm | None = None
    norm_after: Norm | None = None
    norm_out: Norm | None = None
    norm_state: Norm | None = None
    activation: str = "silu"
    residual: float = 1.0

    @property
    def linears(self) -> tuple[Linear | None, ...]:
        """Those of q, k, v, o, gate, up and down."""
        return self[:7]

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        """The eight norms, in order."""
        return self[7:15]


class DraftTree(NamedTuple):
    """A batch of draft trees; node 0 is the root, parents precede children.

    tokens [B, N] int64; parents [B, N] int32, the root's and padding's -1; depth [B, N] int32; mask [B, N, W]
    int64, bit b of word w set where node 64 w + b is an ancestor, the root or the node itself; size [B] int32,
    nodes in use; max_depth, a Python int, bounds depth.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    mask: Tensor
    size: Tensor
    max_depth: int


class Verdict(NamedTuple):
    """What verification accepted.

    path [B, max_depth + 1] int32: the root (0), then the accepted nodes, padded with -1; num_accepted [B] int32:
    draft tokens, without the root; next_token [B] int64: the target's choice at the last node of the path;
    status [B] int32: bits STATUS_NAN, STATUS_NO_FINITE, STATUS_BAD_TREE.
    """

    path: Tensor
    num_accepted: Tensor
    next_token: Tensor
    status: Tensor


HOTTEST = 1e30
"""The highest temperature: not far above it fp32 overflows."""
STATUS_NAN = 1
"""A NaN in the row's logits, taken as -inf."""
STATUS_NO_FINITE = 2
"""No finite logit in the row: token 0 was chosen."""
STATUS_BAD_TREE = 4
"""The tree or a parent or token id in it is invalid: nothing of that row was accepted."""


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError, naming the value and what is allowed, for settings no distribution has."""
    if not 0.0 <= temperature <= HOTTEST:
        raise ValueError(f"temperature is {temperature}; allowed: 0 (greedy) or a positive number up to {HOTTEST:g}")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; allowed: 0 (off) or a positive integer")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; allowed: above 0, at most 1 (off)")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p is {min_p}; allowed: 0 (off) to 1")


def check_adjustments(repetition: float, frequency: float, presence: float, ngram: int) -> None:
    """Raise ValueError, naming the value and what is allowed, for settings that make no sense."""
    if not 0.0 < repetition < math.inf:
        raise ValueError(f"repetition is {repetition}; allowed: a positive number, 1 (off)")
    for name, value in (("frequency", frequency), ("presence", presence)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; allowed: a finite number, 0 (off)")
    if not 0 <= ngram < 2**31:
        raise ValueError(f"ngram is {ngram}; allowed: 0 (off) or a positive integer below 2**31")


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
