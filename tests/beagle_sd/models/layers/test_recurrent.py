"""Recurrent layers over a chain: each token as in plain decoding, and back to whatever each row accepts."""

from __future__ import annotations

import pytest
import torch

from beagle_sd.models.cache import causal
from beagle_sd.models.target import Target
from bench.answers.kinds.tiny_targets import VOCAB, tiny_target

KINDS = ("qwen3_next", "nemotron_h", "lfm2", "falcon_h1", "mamba", "jamba")


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_go_back_to_what_they_accept(kind, fixed):
    """After a chain of 5 and 0, 2 or 5 accepted, the states are those of the accepted text alone."""
    target = Target(tiny_target(kind))
    gen = torch.Generator().manual_seed(0)
    texts = torch.randint(3, VOCAB, (3, 19), generator=gen)
    prompt, taken = torch.tensor([9, 4, 1], dtype=torch.int32), torch.tensor([0, 2, 5])
    cache = target.new_cache(3, 30, fixed=fixed)
    target.prefill(texts[:, :9], prompt, cache)
    chain = torch.stack([row[length : length + 5] for row, length in zip(texts, prompt.tolist(), strict=True)])
    step = torch.arange(5).expand(3, -1)
    states = target.forward(chain, step, causal(3, 5, texts.device), cache)
    cache.advance(taken)
    assert cache.lengths.tolist() == [9, 6, 6]
    for row, length in enumerate((prompt + taken).tolist()):
        alone = target.new_cache(1, 30)
        target.prefill(texts[row : row + 1, : prompt[row]], prompt[row : row + 1], alone)
        for token in range(int(prompt[row]), length):
            one = target.forward(
                texts[row : row + 1, token : token + 1], step[:1, :1], causal(1, 1, texts.device), alone
            )
            alone.advance(torch.ones(1, dtype=torch.int64))
            torch.testing.assert_close(states[row, token - int(prompt[row])], one[0, 0], rtol=1e-4, atol=1e-4)
        for index, recurrence in cache.recurrences.items():
            for have, want in zip(recurrence.states, alone.recurrences[index].states, strict=True):
                torch.testing.assert_close(have[row], want[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_text_begins_without_the_states_of_the_one_before():
    target = Target(tiny_target("qwen3_next"))
    tokens, lengths = torch.arange(3, 12)[None], torch.tensor([9], dtype=torch.int32)
    cache = target.new_cache(1, 12)
    first = target.prefill(tokens, lengths, cache)
    assert target.prefill(tokens, lengths, cache).equal(first)


@torch.inference_mode()
def test_a_forward_that_fails_leaves_no_history(monkeypatch):
    """Nobody takes the tokens of a forward whose last layer raises: the next one goes back to its own beginning."""
    target = Target(tiny_target("lfm2"))
    cache = target.new_cache(1, 12)
    target.prefill(torch.arange(3, 9)[None], torch.tensor([6], dtype=torch.int32), cache)
    tokens, step, none = torch.tensor([[5, 6]]), torch.arange(2)[None], torch.zeros(1, dtype=torch.int64)
    before = states_of(cache)
    target.forward(tokens, step, causal(1, 2, tokens.device), cache)
    assert not all(a.equal(b) for a, b in zip(before, states_of(cache), strict=True))
    cache.advance(none)
    assert all(a.equal(b) for a, b in zip(before, states_of(cache), strict=True))

    def failing(*args, **kwargs):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(target._view.layers[-1].self_attn, "forward", failing)
        with pytest.raises(RuntimeError, match="no"):
            target.forward(tokens, step, causal(1, 2, tokens.device), cache)
    left = states_of(cache)
    target.forward(tokens, step, causal(1, 2, tokens.device), cache)
    assert all(len(one.history) == 3 for one in cache.recurrences.values())
    cache.advance(none)
    assert all(a.equal(b) for a, b in zip(left, states_of(cache), strict=True))


def states_of(cache) -> list[torch.Tensor]:
    return [state.clone() for one in cache.recurrences.values() for state in one.states]
