"""Rotary angles looked up: those that the model computes, and PyTorch's threads left asleep."""

from __future__ import annotations

import pytest
import torch
from models import small_draft, small_target
from torch.utils._python_dispatch import TorchDispatchMode

from beagle_sd import TreeShape, generate
from beagle_sd.models.cache import causal
from beagle_sd.models.target import Target

KINDS = {
    "llama": {},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"pad_token_id": 0},
    "llama with dynamic angles": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_angles_computed(kind):
    """At positions on both sides of what is computed at a time."""
    target = Target(small_target(kind.split(" ")[0], max_position_embeddings=2048, **KINDS[kind]))
    ids = torch.randint(1, 90, (1, 640), generator=torch.Generator().manual_seed(0))
    own = target.states(ids)[0]
    step = torch.arange(4)[None]
    with torch.inference_mode():
        cache = target.new_cache(1, 640)
        target.prefill(ids[:, :508], torch.tensor([508], dtype=torch.int32), cache)
        for begin in range(508, 540, 4):
            states = target.forward(ids[:, begin : begin + 4], step, causal(1, 4, ids.device), cache)[0]
            torch.testing.assert_close(states, own[begin : begin + 4], rtol=1e-3, atol=1e-3)
            cache.advance(torch.full((1,), 4))


class Sines(TorchDispatchMode):
    """Counts the forwards that compute angles."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in ("aten.sin.default", "aten.cos.default")
        return func(*args, **kwargs or {})


def test_rounds_compute_none():
    target = small_target()
    draft, counts = small_draft(target), []
    for new in (4, 4, 40):  # the first call is the model's first use
        with Sines() as sines:
            generate(target, draft, torch.ones(1, 3).long(), max_new_tokens=new, tree=TreeShape(3, 2, 6))
        counts.append(sines.count)
    assert counts[1] == counts[2]
