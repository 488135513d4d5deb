"""Rejection sampling of a drafted chain, for engines that need it: output law exactly the target's.

Let p_i and q_i be target's and draft's distribution for draft token x_i, i = 1..K, after temperature and filters, and
u_i coins. "token" (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) accepts x_i while
u_i q_i(x_i) < p_i(x_i); the token after the last accepted one is drawn from max(p - q, 0), or from p after x_K.

"block" (Sun et al., arXiv 2403.10444, algorithm 2) weighs the chain as a whole and never accepts fewer on average:
w_0 = 1, w_i = min(w_{i-1} p_i(x_i) / q_i(x_i), 1); with S_i = sum max(w_i p_{i+1} - q_{i+1}, 0), prefix i passes if
u_i (S_i + 1 - w_i) < S_i, the whole chain if u_K < w_K. The longest prefix that passes, n, is accepted, and the next
token drawn from max(w_n p_{n+1} - q_{n+1}, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .accept_tree import empty_verdict
from .types import Sampling, Verdict

RULES = ("token", "block")


def verify_chain(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_tokens: Tensor,
    positions: Tensor,
    sampling: Sampling,
    rule: str = "token",
    *,
    token_ids: Tensor | None = None,
    backend: str = "auto",
) -> Verdict:
    """Accept a prefix of K drafted tokens and draw the next one.

    target_logits [B, K+1, V] and draft_logits [B, K, V'] f32, f16 or bf16: raw; the op applies the row's temperature
    and filters to both, and the draft must have drawn draft_tokens int64 [B, K] (full ids) from just that, with noise
    of its own: `choose_tokens(..., stream=1, rounds=positions)`. positions int64 [B] of the first draft token: it
    keys this round's coins. rule is "token" or "block". token_ids int64 [V'], ascending: the full ids of a reduced
    draft vocabulary; None means V' = V.

    Returns a Verdict, the chain as nodes 1..K. Status joins the flags of all the row's logits; a draft token outside
    the draft's vocabulary gives STATUS_BAD_TREE and nothing accepted. Raises ValueError or TypeError on wrong shapes,
    dtypes, or rule; the "cuda" backend takes B up to 65535 (BackendError).
    """
    op = "verify_chain"
    checks.tensor(op, "draft_tokens", draft_tokens, [None, None], [torch.int64])
    batch, steps = draft_tokens.shape
    checks.tensor(op, "target_logits", target_logits, [batch, steps + 1, None], checks.LOGITS)
    vocab = target_logits.shape[2]
    checks.at_least(op, "the vocabulary of target_logits", vocab, 1)
    if token_ids is not None:
        checks.tensor(op, "token_ids", token_ids, [None], [torch.int64])
        checks.at_least(op, "the length of token_ids", len(token_ids), 1)
    checks.tensor(
        op, "draft_logits", draft_logits, [batch, steps, vocab if token_ids is None else len(token_ids)], checks.LOGITS
    )
    checks.tensor(op, "positions", positions, [batch], [torch.int64])
    checks.sampling(op, sampling, batch)
    if rule not in RULES:
        raise ValueError(f"{op}: rule is {rule!r}; allowed: {', '.join(map(repr, RULES))}")
    checks.same_device(
        op, target_logits=target_logits, draft_logits=draft_logits, draft_tokens=draft_tokens, token_ids=token_ids
    )
    args = (target_logits, draft_logits, draft_tokens, positions, *sampling, rule, token_ids)
    return Verdict(*torch.ops.beagle.verify_chain(*args, backend))


@backends.operator("verify_chain")
def _verify_chain(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = (seed, temperature, top_k, top_p, min_p)
    args = (target_logits, draft_logits, draft_tokens, positions, *settings, rule, token_ids)
    return backends.call("verify_chain", backend, target_logits.device, *args)


@_verify_chain.register_fake
def _(
    target_logits,
    draft_logits,
    draft_tokens,
    positions,
    seed,
    temperature,
    top_k,
    top_p,
    min_p,
    rule="token",
    token_ids=None,
    backend="auto",
):
    return empty_verdict(draft_tokens, top_k, draft_tokens.shape[1])
