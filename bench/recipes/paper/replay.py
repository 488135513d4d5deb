"""Tokens a round on stored greedy answers: decoding them anew with a draft, without running the target.

An answer that the target wrote greedily holds every choice it would make in verification along the accepted path, and
the shards hold its states. So drafting, building the tree and accepting give what `beagle_sd.generate` would report,
at the cost of the draft alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from beagle_kernels import Sampling, accept_tree, build_tree
from beagle_sd.data import shards
from beagle_sd.decoding import drafting
from beagle_sd.models.draft import BeagleDraft
from bench.answers.acceptance import standard_error
from bench.peers import eagle2

BATCH = 16


def greedy_answers(states: Path, held_out: int) -> list[shards.Sequence]:
    """The held-out sequences that the target wrote greedily and whose answer has two tokens or more, shortest first."""
    found = [
        sequence
        for sequence in shards.read_sequences(states)
        if sequence.index % held_out == held_out - 1
        and sequence.temperature == 0.0
        and sequence.final_token >= 0
        and int(sequence.loss_mask.sum()) > 1
    ]
    if not found:
        raise ValueError(
            f"{states} holds no held-out greedy answer (held_out={held_out}); allowed: states of answers "
            "that the target wrote, some of them greedily"
        )
    return sorted(found, key=lambda sequence: len(sequence.tokens))


@torch.inference_mode()
def replay(draft: BeagleDraft, states: Path, held_out: int, depth: int, branch: int, num_nodes: int) -> dict:
    """Tokens a round over all answers with its standard error (answers taken as independent; 0 of a single one),
    rounds, and acceptance by depth given the parent's."""
    answers = greedy_answers(states, held_out)
    tokens, rounds, reached = [], [], torch.zeros(depth + 1, dtype=torch.int64)
    for start in range(0, len(answers), BATCH):
        for emitted, accepted in _decoded(draft, answers[start : start + BATCH], depth, branch, num_nodes):
            tokens.append(emitted)
            rounds.append(len(accepted))
            reached += (torch.tensor(accepted)[:, None] >= torch.arange(depth + 1)).sum(0)
    shares = [round(b / a, 4) for a, b in zip(reached.tolist(), reached.tolist()[1:]) if a]
    return {
        "tokens_per_round": round(sum(tokens) / sum(rounds), 4),
        "standard_error": standard_error(tokens, rounds) or 0.0,
        "rounds": sum(rounds),
        "acceptance_by_depth": shares,
    }


def _decoded(draft, answers, depth: int, branch: int, num_nodes: int) -> list[tuple[int, list[int]]]:
    """For each answer, the tokens its rounds emitted and how many drafted ones each round accepted."""
    batch, longest = len(answers), max(len(answer.tokens) for answer in answers)
    text = torch.full((batch, longest + depth + 2), -1)
    states = torch.zeros(batch, longest + depth + 2, answers[0].states.shape[1])
    for row, answer in enumerate(answers):
        text[row, : len(answer.tokens) + 1] = torch.cat([answer.tokens, torch.tensor([answer.final_token])])
        states[row, : len(answer.tokens)] = answer.states.float()
    ends = torch.tensor([len(answer.tokens) for answer in answers])
    # As after the prefill: the first answer token is pending, and all before it are known.
    position = torch.tensor([int(answer.loss_mask.nonzero()[0]) + 1 for answer in answers])
    pairs = _keys_of(draft, text.clamp(min=0), states)
    cache = drafting.DraftCache(draft, batch, longest, depth, branch)
    cache.begin(draft, pairs[:, :longest], position)
    rows, sampling = torch.arange(batch), Sampling.of(batch)
    emitted = [0] * batch
    accepted: list[list[int]] = [[] for _ in range(batch)]
    while (live := position < ends).any():
        root, lengths = text[rows, position].clamp(min=0), position.to(torch.int32)
        tree = build_tree(
            root, *_propose(draft, cache, lengths, root, states, sampling, depth, branch), num_nodes, depth
        )
        count = accept_tree(tree, text.gather(1, position[:, None] + 1 + tree.depth)).num_accepted.long()
        known = position[:, None] + torch.arange(depth + 1)
        cache.append_true(draft, pairs[rows[:, None], known], known)
        for row in live.nonzero().flatten().tolist():
            emitted[row] += min(int(count[row]) + 1, int(ends[row] - position[row]))
            accepted[row].append(int(count[row]))
        position = torch.where(live, (position + count + 1).minimum(ends), position)
    return list(zip(emitted, accepted))


def _keys_of(draft: BeagleDraft, tokens: Tensor, states: Tensor) -> Tensor:
    """What gives the keys and values of true positions: states, or EAGLE-2's pooled pairs; [B, T, d]."""
    if not isinstance(draft, eagle2.EagleDraft):
        return states
    before = states.roll(1, 1)
    before[:, 0] = 0.0
    return draft.pooled(draft.embed(tokens), before)


def _propose(draft, cache, lengths, root, states, sampling, depth, branch) -> drafting.Candidates:
    if not isinstance(draft, eagle2.EagleDraft):
        return drafting.propose(draft, cache, lengths, root, sampling, depth, branch)
    before = states[torch.arange(len(root)), lengths.long() - 1]
    return eagle2.propose(draft, cache, lengths, root, before, sampling, depth, branch)
