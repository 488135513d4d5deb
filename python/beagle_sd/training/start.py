"""Where training starts: a block that already passes recent states on.

From random weights the block spends most of a short training on finding the last true state by attention, which
EAGLE's pooling layer is simply given. This start gives it too, and changes nothing else: same block, same method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beagle_sd.data.dataset import PackedDataset
from beagle_sd.models.draft import BeagleDraft

_ROWS = 8192
"""Enough for the means and main directions."""
_PASSED = 2.0
_RECENT = 4.0
_KEPT = 0.1


def passing_start_on(draft: BeagleDraft, dataset: PackedDataset, seed: int) -> BeagleDraft:
    """`passing_start` by some of the sequences to train on, chosen by the seed."""
    sample = dataset.sample(_ROWS, seed)
    return passing_start(draft, sample.tokens, sample.states)


@torch.no_grad()
def passing_start(draft: BeagleDraft, tokens: Tensor, states: Tensor) -> BeagleDraft:
    """Set the attention of a fresh draft so that its output is about twice the mean of recent states.

    tokens [n] int64, states [n, d]: of the target, n >= 1. Values are the states' coordinates along an orthonormal
    basis: of all of d if the key heads are wide enough, else of the n states' main directions; W_O leads each
    coordinate back. W_Q of the mean embedding and W_K of the mean state gain a common vector, on which RoPE lets the
    score fall with distance: 4 for the own position, less and less before it. What the random weights add stays (a
    tenth of it in W_O). Returns `draft`.
    """
    if len(states) == 0 or states.shape != (len(tokens), draft.config.hidden_size):
        raise ValueError(
            f"tokens are {tuple(tokens.shape)} and states {tuple(states.shape)}; allowed: [n] and "
            f"[n, {draft.config.hidden_size}], n at least 1"
        )
    config, device = draft.config, draft.q_proj.weight.device
    keys = draft.norm_state(states.to(device, torch.float32))
    queries = draft.norm_query(draft.embed(tokens.to(device)).float())
    _pass_on(draft, keys)
    facing = torch.zeros(config.head_dim, device=device)
    facing[: config.head_dim // 2] = 1.0  # RoPE turns the pairs (i, i + half) by every frequency once
    facing *= (_RECENT * config.head_dim**0.5 / facing.square().sum()).sqrt()
    _add_for(draft.q_proj.weight, queries.mean(0), facing)
    _add_for(draft.k_proj.weight, keys.mean(0), facing)
    return draft


def _pass_on(draft: BeagleDraft, keys: Tensor) -> None:
    """W_V an orthonormal basis, W_O its transpose, shared by the query heads of a key head."""
    width, size, heads = draft.config.hidden_size, draft.config.head_dim, draft.config.num_key_value_heads
    sharing = draft.config.num_attention_heads // heads
    basis = _basis(keys, min(heads * size, width))
    rest = draft.v_proj.weight[len(basis) :]
    values = torch.cat([basis, torch.zeros_like(rest, dtype=basis.dtype)])
    back = values.view(heads, 1, size, width).expand(-1, sharing, -1, -1).reshape(-1, width).T
    draft.v_proj.weight.copy_(torch.cat([basis, rest.to(basis.dtype)]))
    draft.o_proj.weight.mul_(_KEPT).add_(back * (_PASSED / sharing))


def _basis(keys: Tensor, count: int) -> Tensor:
    """[count, d] orthonormal, mixed so that every head carries a like share."""
    width = keys.shape[1]
    if count == width:
        return torch.eye(width, device=keys.device)
    main = torch.linalg.eigh(keys.T @ keys).eigenvectors[:, -count:].T
    mixing = torch.randn(count, count, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(mixing)[0].to(main) @ main


def _add_for(weight: Tensor, mean: Tensor, vector: Tensor) -> None:
    """Let `weight` [heads * D, d] map `mean` [d] to what it did plus `vector` [D] in every head."""
    heads = len(weight) // len(vector)
    weight.add_(torch.outer(vector.repeat(heads), mean / mean.dot(mean).clamp(min=1e-12)))
