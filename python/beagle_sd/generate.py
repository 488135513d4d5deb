"""The decoding loop: draft a tree, let the target verify it at once, keep what it would have said itself."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from beagle_kernels import (
    STATUS_BAD_TREE,
    STATUS_NO_FINITE,
    DraftTree,
    Sampling,
    Verdict,
    build_tree,
    choose_tokens,
    compact_cache_,
    verify_tree,
)
from beagle_sd.attention import tree_attention_of
from beagle_sd.draft import BeagleDraft
from beagle_sd.drafting import DraftCache, propose
from beagle_sd.linears import skinny_linears_of
from beagle_sd.target import Target

if TYPE_CHECKING:
    from beagle_sd.adaptive import AdaptiveTree


@dataclass(frozen=True)
class TreeShape:
    """How a round drafts: `depth` levels, `branch` expansions a level with `branch` children each, the best
    `num_nodes` kept, root counted. branch 1 is a chain; num_nodes 1 is plain decoding."""

    depth: int
    branch: int
    num_nodes: int

    def __post_init__(self):
        for name, most in (("depth", 64), ("branch", 64), ("num_nodes", 1024)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; allowed: 1 to {most}")

    @classmethod
    def default(cls, device: torch.device) -> TreeShape:
        """The paper's tree on a GPU; a small one on the CPU, where every verified node costs time."""
        return cls(6, 10, 60) if device.type == "cuda" else cls(4, 4, 8)


@dataclass
class Report:
    """What happened. A row's first token comes from the prefill and is not counted in rounds.

    rounds: forwards of the target after the prefill; new_tokens: all emitted tokens; tokens_per_round: emitted
    tokens a round and row, drafts and the target's own; acceptance_by_depth[d]: how often a drafted token at depth
    d + 1 was accepted, given that its parent was; seconds: by phase. row_rounds and reached are the counts behind:
    rounds summed over the rows in progress, and how many of them accepted d or more drafted tokens.
    """

    rounds: int = 0
    new_tokens: int = 0
    tokens_per_round: float = 0.0
    acceptance_by_depth: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    row_rounds: int = 0
    reached: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over all phases' seconds."""
        return self.new_tokens / max(sum(self.seconds.values()), 1e-9)


@dataclass
class Generated:
    """sequences [B, prompt + new] int64: the prompt as given, then the new tokens, padded with pad_token_id."""

    sequences: Tensor
    report: Report


def generate(
    target: PreTrainedModel,
    draft: BeagleDraft | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    depth: int | None = None,
    branch: int | None = None,
    num_nodes: int | None = None,
    adaptive: AdaptiveTree | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
) -> Generated:
    """Decode speculatively: the tokens are those of plain decoding with the same seed, whatever the draft does.

    input_ids [B, T] int64, padded on either side with attention_mask [B, T]; draft None decodes plainly, with the
    same sampler. temperature 0 is greedy. An int seed s means s + b for row b, a tensor [B] is taken as it is.
    depth, branch, num_nodes shape the tree (see TreeShape; None: the device's default), or adaptive chooses each
    round's. eos_token_id None takes the target's generation config's; an empty list never stops early. streamer (one
    row only) is given the prompt, then each round's tokens. stopping_criteria are asked after each token, with one
    unpadded row [1, length] and no scores: a row ends with the first token at which one says so.

    Raises ValueError for bad arguments and for targets or drafts that do not fit, RuntimeError where the target
    gives a row no finite logit. Paper: section 3.4; DESIGN: section 4.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: at least 1")
    wrapped = Target(target)
    if target.training:
        raise ValueError("the target is in training mode, where dropout makes its tokens random; "
                         "allowed: target.eval()")
    prompts, lengths = _prompts(input_ids, attention_mask, wrapped)
    sampling = Sampling.of(len(prompts), seed, temperature, top_k, top_p, min_p, device=wrapped.device)
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"a streamer was given with {len(prompts)} rows; allowed: 1 row")
    if draft is not None:
        draft.bind(target)
    shape = _shape(draft, wrapped.device, depth, branch, num_nodes, adaptive)
    ends, pad = _end_tokens(target, eos_token_id, pad_token_id)
    with torch.inference_mode(), tree_attention_of(target), skinny_linears_of(target, draft):
        loop = _Loop(wrapped, draft, prompts, lengths, sampling, shape, max_new_tokens, ends, stopping_criteria,
                     adaptive if draft is not None else None)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for run in loop.run():
            if streamer is not None and run[0]:
                streamer.put(torch.tensor(run[0]))
        if streamer is not None:
            streamer.end()
    return Generated(_padded(input_ids, loop.emitted, pad), loop.report())


class _Loop:
    """The state of a batch between rounds: target cache, draft cache, pending token, and what was emitted."""

    def __init__(self, target, draft, prompts, lengths, sampling, shape, max_new_tokens, ends,
                 stopping_criteria=(), adaptive=None):  # fmt: skip
        self.target, self.draft, self.sampling, self.shape = target, draft, sampling, shape
        self.max_new_tokens, self.ends, self.stopping_criteria = max_new_tokens, ends, stopping_criteria
        self.adaptive = adaptive
        self.prompts, self.prompt_lengths = prompts, lengths
        batch, longest = prompts.shape
        most = longest + max_new_tokens + shape.depth  # a row's last run may pass its end by as much as depth
        self.cache = target.new_cache(batch, most + shape.num_nodes)
        if draft is not None:
            self.draft_cache = DraftCache(draft, batch, most + 1 + shape.branch * shape.depth)
        self.emitted: list[list[int]] = [[] for _ in range(batch)]
        self.stopped = [False] * batch
        self.seconds: dict[str, float] = defaultdict(float)
        self.rounds = self.row_rounds = self.round_tokens = 0
        self.reached = [0] * (min(shape.depth, shape.num_nodes - 1) + 1)
        self.tried = [0] * len(self.reached)  # of those that reached a depth, the rounds that drafted a further one

    def run(self) -> Iterator[list[list[int]]]:
        """Yields each round's new tokens a row (none for finished rows), the prefill's first."""
        yield self._emit(self._prefill())
        while not all(self.finished):
            if self.adaptive is not None:
                self.shape = self.adaptive.choose()
            tree = self._draft_tree()
            hidden = self._target_forward(tree)
            verdict = self._verify(tree, hidden)
            self._keep(verdict, hidden)
            yield self._emit(self._accepted_tokens(tree, verdict))

    @property
    def finished(self) -> list[bool]:
        return [stopped or len(row) >= self.max_new_tokens or bool(row and row[-1] in self.ends)
                for row, stopped in zip(self.emitted, self.stopped, strict=True)]

    def _prefill(self) -> list[list[int]]:
        with self._phase("prefill"):
            hidden = self.target.prefill(self.prompts, self.prompt_lengths, self.cache)
            last = hidden[torch.arange(len(hidden), device=hidden.device), self.prompt_lengths.long() - 1]
            token, status = choose_tokens(self.target.head(last), self.prompt_lengths.long(), self.sampling)
            _raise_for(status)
            self.pending = token
            if self.draft is not None:
                slots = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
                self.draft_cache.append(self.draft, hidden, slots, slots)
        return [[value] for value in token.tolist()]

    def _draft_tree(self) -> DraftTree:
        with self._phase("draft"):
            if self.draft is None or self.shape.num_nodes == 1:
                none = self.pending[:, None][:, :0]
                return build_tree(self.pending, none, none.float(), none.to(torch.int32), 1, 0)
            candidates = propose(self.draft, self.draft_cache, self.cache.lengths, self.pending, self.sampling,
                                 self.shape.depth, self.shape.branch)
            return build_tree(self.pending, *candidates, self.shape.num_nodes, self.shape.depth)

    def _target_forward(self, tree: DraftTree) -> Tensor:
        with self._phase("target"):
            return self.target.forward(tree.tokens, tree.depth, _visible(tree), self.cache)

    def _verify(self, tree: DraftTree, hidden: Tensor) -> Verdict:
        with self._phase("verify"):
            logits = self.target.head(hidden)
            verdict = verify_tree(logits, tree, self.cache.lengths.long() + 1, self.sampling)
            _raise_for(verdict.status)
            return verdict

    def _keep(self, verdict: Verdict, hidden: Tensor) -> None:
        """Move the accepted nodes' keys into place, give their states to the draft, advance the rows in progress."""
        with self._phase("keep"):
            live = torch.tensor([not done for done in self.finished], device=hidden.device)
            lengths = self.cache.lengths
            if verdict.path.shape[1] > 1:
                compact_cache_(self.cache.states, verdict.path, verdict.num_accepted, lengths)
            if self.draft is not None:
                path = verdict.path.long().clamp(min=0)
                states = hidden.gather(1, path[:, :, None].expand(-1, -1, hidden.shape[2]))
                slots = lengths.long()[:, None] + torch.arange(path.shape[1], device=hidden.device)
                self.draft_cache.append(self.draft, states, slots, slots)
            self.cache.lengths = lengths + torch.where(live, verdict.num_accepted + 1, 0).to(torch.int32)
            self.pending = torch.where(live, verdict.next_token, self.pending)

    def _accepted_tokens(self, tree: DraftTree, verdict: Verdict) -> list[list[int]]:
        drafted = tree.tokens.gather(1, verdict.path.long().clamp(min=0)).tolist()
        counts, own = verdict.num_accepted.tolist(), verdict.next_token.tolist()
        if self.adaptive is not None:
            live = [count for count, done in zip(counts, self.finished, strict=True) if not done]
            self.adaptive.learn(self.shape, sum(live) / len(live))
        self.rounds += 1
        runs = []
        for row, done in enumerate(self.finished):
            runs.append([] if done else drafted[row][1 : 1 + counts[row]] + [own[row]])
            if not done:
                self.row_rounds += 1
                for depth in range(counts[row] + 1):
                    self.reached[depth] += 1
                    self.tried[depth] += depth < min(self.shape.depth, self.shape.num_nodes - 1)
        return runs

    def _emit(self, runs: list[list[int]]) -> list[list[int]]:
        """Append the runs, each cut at its first end token, at the length limit and where a criterion stops it; returns
        what was appended."""
        cut = []
        for number, (row, run) in enumerate(zip(self.emitted, runs, strict=True)):
            run = run[: self.max_new_tokens - len(row)]
            ends = [place for place, token in enumerate(run) if token in self.ends]
            run = run[: ends[0] + 1] if ends else run
            if self.stopping_criteria:
                run = self._until_stopped(number, run)
            if row:
                self.round_tokens += len(run)
            row.extend(run)
            cut.append(run)
        return cut

    def _until_stopped(self, number: int, run: list[int]) -> list[int]:
        """The run up to the first token after which a criterion ends row `number`."""
        prompt = self.prompts[number, : self.prompt_lengths[number]]
        text = torch.cat([prompt, prompt.new_tensor(self.emitted[number] + run)])[None]
        for count in range(1, len(run) + 1):
            text_so_far = text[:, : text.shape[1] - len(run) + count]
            if any(bool(torch.as_tensor(criterion(text_so_far, None)).all()) for criterion in self.stopping_criteria):
                self.stopped[number] = True
                return run[:count]
        return run

    @contextmanager
    def _phase(self, name: str):
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        began = time.perf_counter()
        yield
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        self.seconds[name] += time.perf_counter() - began

    def report(self) -> Report:
        pairs = zip(self.tried, self.reached[1:], strict=False)
        return Report(
            rounds=self.rounds,
            new_tokens=sum(map(len, self.emitted)),
            tokens_per_round=self.round_tokens / max(self.row_rounds, 1),
            acceptance_by_depth=[further / before for before, further in pairs if before],
            seconds=dict(self.seconds),
            row_rounds=self.row_rounds,
            reached=list(self.reached),
        )


def _visible(tree: DraftTree) -> Tensor:
    """The tree's mask words as bool [B, N, N]."""
    nodes = torch.arange(tree.tokens.shape[1], device=tree.mask.device)
    return (tree.mask[:, :, nodes // 64] >> (nodes % 64) & 1).bool()


def _raise_for(status: Tensor) -> None:
    if not bool((status >= STATUS_NO_FINITE).any()):
        return
    for row, bits in enumerate(status.tolist()):
        if bits & STATUS_NO_FINITE:
            raise RuntimeError(f"row {row}: the target gave no finite logit; check its weights and dtype")
        if bits & STATUS_BAD_TREE:
            raise RuntimeError(f"row {row}: the draft gave an invalid tree; check its weights")


def _prompts(input_ids: Tensor, attention_mask: Tensor | None, target: Target) -> tuple[Tensor, Tensor]:
    """The prompts moved to the left [B, T] and their lengths int32 [B]."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {given}; allowed: an integer tensor [B, T]")
    ids = input_ids.to(target.device, torch.int64)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; "
                         f"allowed: that of input_ids, {tuple(ids.shape)}")
    mask = mask != 0
    lengths = mask.sum(1)
    if ids.numel() == 0 or not bool((lengths > 0).all()):
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"input_ids {tuple(ids.shape)} has an empty prompt (rows {empty}); allowed: a token or more")
    if bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > 1).any()) or bool((~mask[:, 0] & ~mask[:, -1]).any()):
        raise ValueError("attention_mask has a gap; allowed: padding at one side of each row")
    vocab = target.config.vocab_size
    if bool(((ids < 0) | (ids >= vocab))[mask].any()):
        wrong = ids[mask & ((ids < 0) | (ids >= vocab))][0]
        raise ValueError(f"input_ids has {int(wrong)}; allowed: 0 to {vocab - 1}")
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices
    kept = torch.where(mask.gather(1, order), ids.gather(1, order), 0)
    return kept[:, : int(lengths.max())], lengths.to(torch.int32)


def _shape(draft, device, depth, branch, num_nodes, adaptive) -> TreeShape:
    if draft is None:
        return TreeShape(1, 1, 1)
    if adaptive is not None:
        if (depth, branch, num_nodes) != (None, None, None):
            raise ValueError(f"depth {depth}, branch {branch}, num_nodes {num_nodes} were given with adaptive; "
                             "allowed: one or the other")
        return adaptive.largest
    default = TreeShape.default(device)
    return TreeShape(
        default.depth if depth is None else depth,
        default.branch if branch is None else branch,
        default.num_nodes if num_nodes is None else num_nodes,
    )


def _end_tokens(target: PreTrainedModel, eos_token_id, pad_token_id) -> tuple[frozenset[int], int]:
    config = target.generation_config
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    return frozenset(ends), pad_token_id


def _padded(input_ids: Tensor, emitted: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, emitted))
    new = torch.tensor([row + [pad] * (longest - len(row)) for row in emitted], dtype=torch.int64)
    return torch.cat([input_ids, new.to(input_ids.device)], 1)
