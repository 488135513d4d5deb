"""A round as one function over fixed buffers, read nowhere on the host (docs/design.md: A round of decoding).

What a round writes, it writes in place; every shape follows from the batch and the tree's. So a CUDA graph of one round
replays as any later one, and on the CPU the same function runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from beagle_kernels import DraftTree, Sampling, Verdict, build_tree, choose_tokens, compact_cache_, verify_tree
from beagle_sd.decoding.drafting import DraftCache, propose
from beagle_sd.decoding.logits import Bias
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.models.cache import grown
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.pictures import PicturePrompt, prefill_pictures
from beagle_sd.models.target import Target

NEWS = 4
"""Columns of the news before the round's tokens: drafted tokens accepted, tokens emitted so far, whether the row goes
on, status bits."""


class Buffers:
    """Everything a round reads and writes, for B rows of at most `tokens` prompt and new tokens; `reserve` makes room.

    cache, draft_cache; pending [B] int64, the last emitted token, whose keys are not cached yet; live [B] bool;
    emitted, limit [B] int64: new tokens so far and at most; ends [V] bool: the tokens that end a row; output [B, *]
    int64 and logprobs [B, *] f32 (or None): the emitted tokens, and what the target gave them; sampling; news
    [B, NEWS + levels + 1] int64: the round for the host; added [V] f32, first [V] int64: the Bias, read if `biased`,
    which is the host's. A row that is not live keeps all of its values.
    """

    def __init__(
        self,
        target: Target,
        draft: BeagleDraft | None,
        batch: int,
        tokens: int,
        shape: TreeShape,
        *,
        page_size: int | None = None,
        fixed: bool = False,
        logprobs: bool = False,
    ):
        device, self.shape, self.tokens = target.device, shape, tokens
        slots, width = self._sizes()
        self.cache = target.new_cache(batch, slots, page_size=page_size, at_once=shape.num_nodes, fixed=fixed)
        self.draft_cache = None
        if draft is not None:
            self.draft_cache = DraftCache(draft, batch, tokens - 1, shape.depth, shape.branch)
        self.pending = torch.zeros(batch, dtype=torch.int64, device=device)
        self.live = torch.zeros(batch, dtype=torch.bool, device=device)
        self.emitted, self.limit = torch.zeros_like(self.pending), torch.zeros_like(self.pending)
        self.ends = torch.zeros(target.config.vocab_size, dtype=torch.bool, device=device)
        self.output = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, width, dtype=torch.float32, device=device) if logprobs else None
        self.sampling = Sampling.of(batch, device=device)
        self.added = torch.zeros(len(self.ends), dtype=torch.float32, device=device)
        self.first = torch.zeros(len(self.ends), dtype=torch.int64, device=device)
        self.biased = False
        self.news = torch.zeros(batch, NEWS + shape.depth + 1, dtype=torch.int64, device=device)

    def _sizes(self) -> tuple[int, int]:
        """Slots a row of the target's cache, and columns of the output."""
        # the last token of a row is never cached
        return self.tokens - 1 + self.shape.num_nodes, self.tokens + self.shape.depth + 1

    def reserve(self, tokens: int, most: int) -> None:
        """Make room for `tokens` prompt and new tokens a row; if they are too few, for twice as many as before but not
        more than `most`. The tensors that grow move: not once a graph holds them."""
        if tokens <= self.tokens:
            return
        self.tokens = min(most, max(tokens, 2 * self.tokens))
        slots, width = self._sizes()
        self.cache.reserve(slots)
        if self.draft_cache is not None:
            self.draft_cache.reserve(self.tokens - 1)
        self.output = grown(self.output, 1, width)
        if self.logprobs is not None:
            self.logprobs = grown(self.logprobs, 1, width)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        found |= {**self.cache.tensors(), **self.sampling._asdict()}
        if self.draft_cache is not None:
            found |= {"draft_keys": self.draft_cache.keys, "draft_values": self.draft_cache.values}
        return found

    def begin(self, sampling: Sampling, max_new_tokens: int, ends: list[int], bias: Bias | None = None) -> None:
        """Set up for a new text in every row."""
        for buffer, given in zip(self.sampling, sampling, strict=True):
            buffer.copy_(given)
        self.live.fill_(True)
        self.emitted.zero_()
        self.limit.fill_(max_new_tokens)
        self.ends.zero_()
        if ends := [token for token in ends if 0 <= token < len(self.ends)]:
            self.ends[torch.tensor(ends, device=self.ends.device)] = True
        self.biased = bool(bias)
        if bias:
            for buffer, values in ((self.added, bias.added), (self.first, bias.first)):
                known = {token: value for token, value in values.items() if 0 <= token < len(buffer)}
                buffer.zero_()
                index = torch.tensor(list(known), dtype=torch.int64, device=buffer.device)
                buffer[index] = torch.tensor(list(known.values()), dtype=buffer.dtype, device=buffer.device)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no row is live: a round changes nothing that a later one reads."""
        live = self.live.clone()
        self.live.zero_()
        try:
            yield
        finally:
            self.live.copy_(live)


Timed = Callable[[str], AbstractContextManager[None]]


def _untimed(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def prefill(
    target: Target,
    draft: BeagleDraft | None,
    prompts: Tensor,
    lengths: Tensor,
    buffers: Buffers,
    pictures: PicturePrompt | None = None,
) -> None:
    """Run right-padded prompts [B, T] with `lengths` [B] int32, or the same with pictures in them, and emit each row's
    first token."""
    if pictures is not None:
        hidden = prefill_pictures(target, pictures, buffers.cache)
    else:
        buffers.cache.offsets.zero_()
        hidden = target.prefill(prompts, lengths, buffers.cache)
    position = lengths.long()
    last = hidden.gather(1, (position - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
    logits = target.head(last)
    scores = _biased(logits, torch.zeros_like(position)[:, None], buffers)
    token, status = choose_tokens(scores[:, 0], position, buffers.sampling)
    if draft is not None and buffers.draft_cache is not None:
        buffers.draft_cache.begin(draft, hidden, lengths)
    # what a root accepts that has no children
    none = torch.zeros_like(status)
    _emit(buffers, Verdict(none[:, None], none, token, status), token[:, None], logits)


def play_round(
    target: Target, draft: BeagleDraft | None, buffers: Buffers, shape: TreeShape, timed: Timed = _untimed
) -> None:
    """Draft a tree, let the target verify it, keep what it would have said itself: one to depth + 1 tokens a row."""
    with timed("draft"):
        tree = _draft_tree(draft, buffers, shape)
    with timed("target"):
        hidden = target.forward(tree.tokens, tree.depth, tree.mask, buffers.cache)
    with timed("verify"):
        logits = target.head(hidden)
        scores = _biased(logits, tree.depth, buffers)
        verdict = verify_tree(scores, tree, buffers.cache.lengths.long() + 1, buffers.sampling)
    with timed("keep"):
        _keep(draft, buffers, tree, verdict, hidden, logits)


def _biased(logits: Tensor, depth: Tensor, buffers: Buffers) -> Tensor:
    """The logits [B, N, V] that nodes at `depth` [B, N] choose by: these themselves without a bias."""
    if not buffers.biased:
        return logits
    number = buffers.emitted[:, None] + depth
    added = logits.to(torch.promote_types(logits.dtype, torch.float32)) + buffers.added
    return torch.where(number[:, :, None] < buffers.first, -torch.inf, added)


def _draft_tree(draft: BeagleDraft | None, buffers: Buffers, shape: TreeShape) -> DraftTree:
    root = buffers.pending
    if draft is None or buffers.draft_cache is None or shape.num_nodes == 1:
        none = root[:, None][:, :0]
        return build_tree(root, none, none.float(), none.to(torch.int32), 1, 0)
    candidates = propose(
        draft, buffers.draft_cache, buffers.cache.lengths, root, buffers.sampling, shape.depth, shape.branch
    )
    return build_tree(root, *candidates, shape.num_nodes, shape.depth)


def _keep(draft, buffers: Buffers, tree: DraftTree, verdict: Verdict, hidden: Tensor, logits: Tensor) -> None:
    """Move the accepted nodes' keys into place, give their states to the draft, emit their tokens, advance."""
    lengths, path = buffers.cache.lengths, verdict.path.long().clamp(min=0)
    step = torch.arange(path.shape[1], device=path.device)
    if path.shape[1] > 1:
        for states, span in zip(buffers.cache.states, buffers.cache.spans, strict=True):
            compact_cache_(states, verdict.path, verdict.num_accepted, lengths, block_table=buffers.cache.table(span))
    if buffers.draft_cache is not None:
        states = hidden.gather(1, path[:, :, None].expand(-1, -1, hidden.shape[2]))
        buffers.draft_cache.append_true(draft, states, lengths.long()[:, None] + step)
    run = verdict.next_token[:, None]
    if path.shape[1] > 1:
        drafted = tree.tokens.gather(1, path).roll(-1, 1)
        run = torch.where(step < verdict.num_accepted[:, None], drafted, run)
    buffers.cache.advance(_emit(buffers, verdict, run, logits))


def _emit(buffers: Buffers, verdict: Verdict, run: Tensor, logits: Tensor) -> Tensor:
    """Append run [B, L], of which num_accepted + 1 tokens count, to the live rows, each cut at its first end token and
    at its limit; returns how many were appended [B] int64."""
    count, live = run.shape[1], buffers.live
    step = torch.arange(count, device=run.device)
    index = buffers.emitted[:, None] + step
    buffers.output.scatter_(1, index, run)
    if buffers.logprobs is not None:
        buffers.logprobs.scatter_(1, index, _logprobs(logits, verdict.path, run))
    end = torch.where(buffers.ends[run], step, count).amin(1)
    taken = torch.minimum(torch.minimum(verdict.num_accepted, end) + 1, buffers.limit - buffers.emitted) * live
    status = verdict.status * live
    torch.where(live, verdict.next_token, buffers.pending, out=buffers.pending)
    buffers.emitted += taken
    live &= (end >= taken) & (buffers.emitted < buffers.limit)
    counts = torch.stack((verdict.num_accepted.long(), buffers.emitted, live.long(), status.long()), 1)
    buffers.news[:, : NEWS + count] = torch.cat((counts, run), 1)
    return taken


def _logprobs(logits: Tensor, path: Tensor, run: Tensor) -> Tensor:
    """log softmax of logits [B, N, V] at the nodes of path [B, L] for the tokens run [B, L]: f32 [B, L]."""
    at = path.long().clamp(min=0)[:, :, None].expand(-1, -1, logits.shape[2])
    rows = logits.gather(1, at).float()
    rows = torch.where(rows.isnan(), -torch.inf, rows)
    return rows.gather(2, run[:, :, None])[:, :, 0] - rows.logsumexp(-1)
