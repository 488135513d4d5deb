"""What layers keep, found by one token: heads and widths of each, how far back they see, who has recurrent states."""

from __future__ import annotations

import pytest
import torch

from beagle_sd.models.layers.attention import Span
from beagle_sd.models.target import Target
from bench.answers.kinds.tiny_targets import REACH, tiny_target

WINDOW = Span(window=REACH)
SHOWN = {
    "llama": [(2, 16, 16, Span())] * 2,
    "mistral": [(2, 16, 16, WINDOW)] * 2,
    "llama4_text": [(2, 16, 16, Span(chunk=REACH))] * 3 + [(2, 16, 16, Span())],
    "deepseek_v3": [(1, 32, 16, Span())] * 2,  # as transformers caches it: latents, and the common rotary part
}


@pytest.mark.parametrize("kind", SHOWN)
def test_heads_widths_and_spans(kind):
    kept = Target(tiny_target(kind)).kept
    assert [(one.heads, one.key_width, one.value_width, one.span) for one in kept] == SHOWN[kind]
    assert all(one.recurrence is None and one.dtype == torch.float32 for one in kept)


def test_recurrent_layers_and_who_runs_them():
    kept = Target(tiny_target("qwen3_next")).kept
    assert [one.mixers for one in kept] == [(f"layers.{layer}.linear_attn",) for layer in range(3)] + [()]
    assert [one.recurrence is not None for one in kept] == [True] * 3 + [False]
    both = Target(tiny_target("falcon_h1")).kept
    assert all(one.heads and one.recurrence is not None for one in both)


def test_layers_of_other_sizes_and_layers_that_read_others():
    target = tiny_target("gemma3n_text", num_kv_shared_layers=2)
    own = target.config.num_hidden_layers - 2
    kept = Target(target).kept  # older versions of transformers have no entry of the others
    assert own > 0 and [bool(one.heads) for one in kept] == [True] * own + [False] * (len(kept) - own)
    sizes = {(one.heads, one.key_width) for one in Target(tiny_target("gemma4_text")).kept if one.heads}
    assert len(sizes) > 1


def test_more_tokens_than_the_pages_were_made_for_are_refused():
    target = Target(tiny_target("mistral"))
    cache = target.new_cache(1, 2000, page_size=4)
    step = torch.arange(513)[None]
    with pytest.raises(ValueError, match="a forward over 513 new tokens; allowed: 512"):
        cache.expect(step, None, stepping=True, ends=None)


def test_the_cache_lays_equal_layers_together():
    target = Target(tiny_target("deepseek_v3"))
    cache = target.new_cache(3, 20)
    assert [states.shape for states in cache.states] == [(2, 1, 3, 1, 20, 32), (2, 1, 3, 1, 20, 16)]
    keys, values = cache.layer(1)
    assert keys.shape == (3, 1, 20, 32) and values.shape == (3, 1, 20, 16)
    assert keys.data_ptr() == cache.states[0][1, 0].data_ptr()
