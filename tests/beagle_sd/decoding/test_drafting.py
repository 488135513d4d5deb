"""The draft's tree against its definition, node by node: what a node sees, its score, its parent."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, agreeable_target, small_draft

from beagle_kernels import Sampling
from beagle_kernels.reference.philox import gumbel
from beagle_sd.decoding.drafting import DraftCache, propose

LENGTHS = [7, 3]


@torch.no_grad()
def state_of(draft, states, path: list[int]) -> torch.Tensor:
    """S of the last of `path`, whose first token follows the true states: by dense attention."""
    seen, window = list(enumerate(states)), draft.config.window_keys
    for place, token in enumerate(path, len(states)):
        embedded = draft.embed(torch.tensor([token]))
        query = draft.queries(embedded, torch.tensor([place]))[0]
        positions = [position for position, _ in seen if window is None or position >= place - window]
        shown = torch.stack([state for position, state in seen if position in positions] or [states[0] * 0])
        keys, values = draft.keys_values(shown, torch.tensor(positions or [0]))
        if not positions:
            values = values * 0
        group = query.shape[0] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        weights = (torch.einsum("hd,khd->hk", query, keys) * query.shape[1] ** -0.5).softmax(-1)
        state = draft.block(embedded, torch.einsum("hk,khd->hd", weights, values)[None])[0]
        if draft.config.append_states:
            seen.append((place, state))
    return state


def proposed(draft, temperature, depth, branch):
    """Candidates below two ragged rows, with the true states they follow."""
    states = torch.randn(2, 7, 64, dtype=draft.q_proj.weight.dtype)
    lengths, root = torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor([5, 60])
    cache = DraftCache(draft, 2, 7, depth, branch)
    sampling = Sampling.of(2, 4, temperature)
    with torch.no_grad():
        cache.begin(draft, states, lengths)
        return states, root, sampling, propose(draft, cache, lengths, root, sampling, depth, branch)


def check_candidates(draft, states, lengths, root, sampling, found, depth, branch):
    """Every candidate, its score and its parent against the definition; `states` [B, T, d] are the true ones."""
    ids = torch.arange(VOCAB) if draft.draft_vocab is None else draft.draft_vocab
    assert found.tokens.shape == (len(root), branch + (depth - 1) * branch * branch)
    for row, length in enumerate(lengths.tolist()):
        below = {-1: (0, 0.0, [int(root[row])])}  # candidate: its level, score and path
        expanded = [-1]
        place = 0
        for level in range(depth):
            for parent in expanded:
                _, score, path = below[parent]
                logits = draft.logits(state_of(draft, states[row, :length], path)).float()
                noise = gumbel(sampling.seed[row : row + 1], torch.tensor([length + level + 1]), VOCAB)[0, ids]
                value = logits + sampling.temperature[row] * noise
                ranked = value.topk(branch)
                others = logits.index_fill(0, ranked.indices, -torch.inf)
                here = slice(place, place + branch)
                assert found.parents[row, here].tolist() == [parent] * branch
                assert found.tokens[row, here].tolist() == ids[ranked.indices].tolist()
                gain = ranked.values - torch.cat((ranked.values, others)).logsumexp(0)
                torch.testing.assert_close(found.scores[row, here], score + gain, rtol=1e-3, atol=1e-3)
                for child in range(place, place + branch):
                    below[child] = level + 1, float(found.scores[row, child]), [*path, int(found.tokens[row, child])]
                place += branch
            level_below = [child for child, (at, *_) in below.items() if at == level + 1]
            expanded = sorted(level_below, key=lambda child: -below[child][1])[:branch]
        assert place == found.tokens.shape[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"append_states": False}, {"draft_vocab": torch.arange(1, VOCAB, 2)}],
    ids=["plain", "no states appended", "reduced vocabulary"],
)
def test_candidates_are_the_definitions(settings, temperature):
    draft = small_draft(agreeable_target(), initializer_range=0.2, **settings)
    states, root, sampling, found = proposed(draft, temperature, 4, 3)
    check_candidates(draft, states, torch.tensor(LENGTHS), root, sampling, found, 4, 3)


@pytest.mark.parametrize("window, append_states", [(1, True), (6, True), (7, False), (60, True), (130, True)])
def test_a_window_after_rounds_of_which_little_was_kept(window, append_states):
    """Ragged prompts below, at and beyond the window, then rounds that write true states of nodes nobody accepts."""
    depth, branch = 4, 3
    draft = small_draft(agreeable_target(), initializer_range=0.2, window_keys=window, append_states=append_states)
    states, lengths = torch.randn(2, 80, 64), torch.tensor([60, 3], dtype=torch.int32)
    root, sampling = torch.tensor([5, 60]), Sampling.of(2, 4, 1.0)
    cache = DraftCache(draft, 2, 80, depth, branch)
    cache.keys.fill_(torch.nan)  # what another text may have left
    cache.values.fill_(torch.nan)
    room, step = cache.keys.shape, torch.arange(depth + 1)
    with torch.no_grad():
        cache.begin(draft, states[:, :60], lengths)
        for kept in (1, 0, depth + 1, 2):
            found = propose(draft, cache, lengths, root, sampling, depth, branch)
            check_candidates(draft, states, lengths, root, sampling, found, depth, branch)
            positions = lengths.long()[:, None] + step
            path = states[torch.arange(2)[:, None], positions]
            cache.append_true(draft, torch.where(step[:, None] < kept, path, 9.0), positions)
            lengths = lengths + kept
            cache.reserve(10 * kept)
    assert cache.keys.shape == cache.values.shape == room


def test_a_chain_follows_the_best_token():
    draft = small_draft(agreeable_target(), initializer_range=0.2)
    states, root, _, found = proposed(draft, 0.0, 6, 1)
    assert found.parents.tolist() == [[-1, 0, 1, 2, 3, 4]] * 2
    for row, length in enumerate(LENGTHS):
        path = [int(root[row])]
        for token in found.tokens[row].tolist():
            assert token == int(draft.logits(state_of(draft, states[row, :length], path)).argmax())
            path.append(token)


def test_draft_states_change_what_is_proposed():
    """Else the tests above would pass for a draft that never reads its own states."""
    target = agreeable_target()
    tokens = []
    for append_states in (True, False):
        draft = small_draft(target, initializer_range=0.2, append_states=append_states)
        torch.manual_seed(2)
        tokens.append(proposed(draft, 0.0, 4, 3)[-1])
    assert torch.equal(tokens[0].tokens[:, :3], tokens[1].tokens[:, :3])
    assert not torch.allclose(tokens[0].scores, tokens[1].scores)


def test_more_branches_than_draft_tokens():
    draft = small_draft(agreeable_target(), draft_vocab=torch.tensor([3, 50]))
    *_, found = proposed(draft, 0.0, 3, 5)
    assert found.tokens.shape == (2, 2 + 2 * 2 * 2) and set(found.tokens.flatten().tolist()) == {3, 50}
