"""A draft that sees a window of keys: the text stays plain decoding's, its cache and its prefill stay of one size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from decoding_cases import prompts
from models import small_draft
from round_cases import TREE, decoded, rows, texts

from beagle_kernels import Sampling
from beagle_sd import AdaptiveTree, BeagleDraft, Engine, generate
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import TreeShape


def windowed(draft: BeagleDraft, window: int) -> BeagleDraft:
    """The same weights with a window."""
    target = draft.target.model
    again = small_draft(target, window_keys=window, draft_vocab=draft.draft_vocab)
    again.load_state_dict(draft.state_dict())
    return again


@pytest.mark.parametrize("options", [{}, {"fixed": True, "page_size": 7}], ids=["eager", "fixed, in pages"])
def test_every_path_gives_the_text_of_plain_decoding(pair, options):
    """Rows that end at different lengths, on one engine for two texts: a round gives what it gives on a fresh one."""
    target, draft = pair[0], windowed(pair[1], 8)
    fresh = partial(Engine, target, draft, batch=3, capacity=70, tree=TreeShape(5, 8, 70), **options)
    engine = fresh()
    for longest in (40, 11):
        ids, mask = rows(3, longest)
        settings = {"max_new_tokens": 30, "temperature": 0.9, "seed": 3}
        free = generate(target, None, ids, mask, **settings).sequences
        settings |= {"eos_token_id": int(free[0, longest + 15]), "pad_token_id": 0}
        reused, anew = (generate(target, draft, ids, mask, engine=own, **settings) for own in (engine, fresh()))
        assert torch.equal(reused.sequences, generate(target, None, ids, mask, **settings).sequences)
        reused.report.seconds = anew.report.seconds = {}
        assert reused.report == anew.report and reused.report.tokens_per_round > 1.2


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 9}], ids=str)
def test_a_window_longer_than_the_text_changes_nothing(pair, settings):
    target, draft = pair
    ids, mask = rows(3)
    want, got = (
        generate(target, one, ids, mask, max_new_tokens=30, tree=TREE, **settings)
        for one in (draft, windowed(draft, 41))
    )
    want.report.seconds = got.report.seconds = {}
    assert torch.equal(want.sequences, got.sequences) and want.report == got.report


def test_trees_that_change_with_the_text(pair):
    target, draft = pair[0], windowed(pair[1], 2)  # the deepest nodes see no true key, and not all their ancestors
    shapes = {TreeShape(2, 1, 3): 2.0, TreeShape(6, 4, 16): 3.0}
    tree = AdaptiveTree(Costs({1: 1.0, 3: 1.1, 16: 1.2}, dict.fromkeys(shapes, 0.1)), shapes, probe=2)
    ids = prompts(1)
    made = generate(target, draft, ids, max_new_tokens=50, tree=tree)
    assert torch.equal(made.sequences, generate(target, None, ids, max_new_tokens=50).sequences)


def test_the_cache_keeps_its_size_and_prefill_the_tail(pair, monkeypatch):
    """Over a text of hundreds of tokens; then the ring holds what one plain pass gives for the window."""
    target, draft = pair[0], windowed(pair[1], 16)
    ids, lengths = prompts(2, 300), torch.tensor([300, 5], dtype=torch.int32)
    computed, keys_values = [], BeagleDraft.keys_values
    monkeypatch.setattr(
        BeagleDraft,
        "keys_values",
        lambda self, states, at: (computed.append(states.shape[1]), keys_values(self, states, at))[1],
    )
    engine = Engine(target, draft, batch=2, capacity=400, tree=TREE)
    cache = engine.buffers.draft_cache
    size, place = cache.keys.nbytes, cache.keys.data_ptr()
    with torch.inference_mode():
        decoding, rows = decoded(engine, texts(ids, lengths.tolist(), 100, Sampling.of(2, 3, temperature=1.0)), [])
    assert decoding.report().new_tokens == 200
    assert engine.buffers.tokens == 400 and (cache.keys.nbytes, cache.keys.data_ptr()) == (size, place)
    assert computed[0] == max(computed) == 16, "of 300 positions"
    with torch.inference_mode():
        for row, one in enumerate(sorted(rows, key=lambda one: one.slot)):
            text = torch.tensor(one.text.ids + one.tokens[:-1])
            last = torch.arange(len(text))[-16:]
            states = target(text[None], output_hidden_states=True).hidden_states[-1][0]
            for ours, theirs in zip((cache.keys, cache.values), keys_values(draft, states[last], last), strict=True):
                torch.testing.assert_close(
                    ours[row, :, last % cache.ring], theirs.transpose(0, 1), rtol=1e-4, atol=1e-4
                )
