"""EAGLE-2's draft head (arXiv 2401.15077, section 4.1; 2406.16858 drafts trees with it), as a peer of the Beagle block.

Written from the published algorithm. A pooling layer joins a token's embedding with the target's state one position
before, and one decoder layer of the target's shape, without its first norm, attends the pairs causally, its own among
them:

    x_i = fc([e(t_i); H_{i-1}])        S_i = layer(x_0 .. x_i)        logits_i = lm_head(S_i)

In drafting S_{i-1} takes the place of H_{i-1} where the target's state is not known yet. H_{-1} is a zero vector. It
learns from `beagle_sd.training.trainer.Trainer`, one step at a time, with `states=eagle_states` and `window=1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beagle_kernels import Sampling, block_attention, extend_attention, top_candidates, tree_attention
from beagle_sd.data.batch import Batch
from beagle_sd.decoding.drafting import Candidates, DraftCache
from beagle_sd.models.config import BeagleConfig
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.layers.linears import FewRowsLinear
from beagle_sd.training.objective import rows_by_step


class EagleConfig(BeagleConfig):
    """A Beagle config with the norms that EAGLE has not switched off, and without a window: ValueError."""

    model_type = "eagle2"

    def __init__(self, norm_query: bool = False, norm_state: bool = False, norm_output: bool = False, **kwargs):
        super().__init__(norm_query=norm_query, norm_state=norm_state, norm_output=norm_output, **kwargs)
        if self.window_keys is not None:
            raise ValueError(f"window_keys is {self.window_keys}; allowed for EAGLE-2's head: None")


class EagleDraft(BeagleDraft):
    """Queries, keys and values all come from the pooled pairs x; `block` adds the attention to x. Made and saved as a
    BeagleDraft is."""

    config_class: type[BeagleConfig] = EagleConfig

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.fc = FewRowsLinear(2 * config.hidden_size, config.hidden_size)

    def pooled(self, embedded: Tensor, before: Tensor) -> Tensor:
        """x = fc([e; H before]): two [..., d] -> [..., d]."""
        return self.fc(torch.cat((embedded, before.to(embedded.dtype)), -1))


def states_before(states: Tensor, first: Tensor) -> Tensor:
    """[T, d] row i - 1 in place of row i, zeros in the rows `first` that begin a sequence."""
    return states.roll(1, 0).index_fill(0, first, 0.0)


def eagle_states(
    draft: EagleDraft,
    batch: Batch,
    keys_of: Tensor,
    window: int,
    offset: Tensor,
    *,
    simulated: bool,
    detach_states: bool = False,
) -> Tensor:
    """Draft states [T, d], as `beagle_sd.training.objective.draft_states` has them of a Beagle draft. simulated: row
    s + m of a window that starts at s pools the draft state of row s + m - 1, and row s the true state; costs `window`
    passes of attention. Otherwise every row pools the true state, whatever the window."""
    embedded = draft.embed(batch.tokens)
    before = states_before(keys_of, batch.cu_seqlens[:-1].long())
    x = draft.pooled(embedded, before)
    keys, values = draft.keys_values(x, batch.positions)
    if not simulated:
        queries = draft.queries(x, batch.positions)
        earlier = block_attention(queries, keys, values, 1, torch.zeros_like(offset), batch.cu_seqlens)
        return draft.block(x, extend_attention(*earlier, queries, keys[:, None], values[:, None])[0])
    states = torch.zeros_like(x)
    drafted: list[tuple[Tensor, Tensor]] = []
    state = before
    for step, rows in enumerate(rows_by_step(batch, window, offset)):
        state = state[rows] if step == 0 else state[: len(rows)]
        pooled = draft.pooled(embedded[rows], state.detach() if detach_states else state)
        drafted.append(draft.keys_values(pooled, batch.positions[rows]))
        queries = draft.queries(pooled, batch.positions[rows])
        all_queries = queries.new_zeros(len(x), *queries.shape[1:]).index_copy(0, rows, queries)
        out, lse = block_attention(all_queries, keys, values, window, offset, batch.cu_seqlens)
        local = (torch.stack([part[: len(rows)] for part in parts], 1) for parts in zip(*drafted))
        state = draft.block(pooled, extend_attention(out[rows], lse[rows], queries, *local)[0])
        states = states.index_copy(0, rows, state)
    return states


def propose(
    draft: EagleDraft,
    cache: DraftCache,
    lengths: Tensor,
    root: Tensor,
    before: Tensor,
    sampling: Sampling,
    depth: int,
    branch: int,
) -> Candidates:
    """`depth` levels of candidates below root [B], as `beagle_sd.decoding.drafting.propose`; before [B, d] is the
    target's state at position lengths[b] - 1, and the cache holds the pairs below lengths[b]."""
    batch, device = len(root), root.device
    branch = min(branch, len(draft.head))
    slots = 1 + branch * (depth - 1)
    limit, words = int(lengths.max()) + slots, (slots + 63) // 64
    tokens, before, score = root[:, None], before[:, None], torch.zeros(batch, 1, device=device)
    number = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
    visible = torch.zeros(batch, 1, words, dtype=torch.int64, device=device)
    found: list[Candidates] = []
    slot = 0
    for level in range(depth):
        width = tokens.shape[1]
        position = (lengths.long() + level)[:, None].expand(-1, width)
        x = draft.pooled(draft.embed(tokens), before)
        slots_of_level = torch.arange(slot, slot + width, device=device)
        cache.append(draft, x, lengths.long()[:, None] + slots_of_level, position)
        visible = visible | _bits(slots_of_level, words)
        slot += width
        queries = draft.queries(x.flatten(0, 1), position.flatten()).unflatten(0, tokens.shape)
        attended = tree_attention(queries, cache.keys[:, :, :limit], cache.values[:, :, :limit], lengths, visible)
        state = draft.block(x, attended)
        child, gain = top_candidates(
            draft.logits(state.flatten(0, 1)),
            branch,
            (position + 1).flatten(),
            sampling.repeat(width),
            token_ids=draft.draft_vocab,
        )
        total = score[:, :, None] + gain.view(batch, width, branch).clamp(max=0.0)
        first = sum(part.tokens.shape[1] for part in found)
        parents = number[:, :, None].expand(-1, -1, branch).to(torch.int32)
        found.append(Candidates(child.view(batch, -1), total.flatten(1), parents.flatten(1)))
        score, best = total.flatten(1).topk(branch, dim=1)
        tokens, number = found[-1].tokens.gather(1, best), best + first
        visible = visible.gather(1, (best // branch)[:, :, None].expand(-1, -1, words))
        before = state.gather(1, (best // branch)[:, :, None].expand(-1, -1, state.shape[2]))
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _bits(slots: Tensor, words: int) -> Tensor:
    """[n, words] int64: row i has only bit slots[i] set."""
    word = torch.arange(words, device=slots.device)
    return torch.where(slots[:, None] // 64 == word, torch.ones_like(slots)[:, None] << (slots[:, None] % 64), 0)
