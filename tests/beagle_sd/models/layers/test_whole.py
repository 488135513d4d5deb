"""Decoder layers as one op: which are taken over, that tokens stay those of the model, and rows those of rows alone."""

from __future__ import annotations

import types

import pytest
import torch
from models import VOCAB, agreeable_target, small_draft, small_target
from torch import nn

from beagle_sd import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.cache import causal
from beagle_sd.models.layers.linears import served
from beagle_sd.models.target import Target

pytestmark = pytest.mark.skipif(not served(), reason="the extension is not built")
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "smollm3": {"num_hidden_layers": 4},
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 0.5},
    "seed_oss": {},
}


def prompt(rows: int = 1, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, rows):  # ragged, padded on the left
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens_of(target, draft=None, rows: int = 1, **kwargs):
    return generate(target, draft, **prompt(rows), max_new_tokens=20, eos_token_id=[], pad_token_id=0, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_taken_over_and_keeps_its_tokens(kind):
    target = small_target(kind.split(" ")[0], **KINDS[kind])
    for rows in (1, 3):
        want = target.generate(**prompt(rows), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        for draft, tree in ((None, None), (small_draft(target), TreeShape(3, 2, 7))):
            found = tokens_of(target, draft, rows, tree=tree)
            assert torch.equal(found.sequences, want)
            assert found.report.layers == f"{target.config.num_hidden_layers} as one op"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mistral"])
def test_a_tree_s_states_are_those_of_tokens_alone_to_the_last_bit(kind, dtype):
    target = Target(small_target(kind, **KINDS[kind]).to(dtype))
    text, path = torch.arange(70)[None] % VOCAB, (0, 2, 5)
    nodes, parents = torch.tensor([[3, 50, 7, 9, 11, 20]]), (-1, 0, 0, 1, 1, 2)
    sees = [0] * 6
    for node, parent in enumerate(parents):
        sees[node] = 1 << node | (sees[parent] if node else 0)
    depth = torch.tensor([[bin(one).count("1") - 1 for one in sees]])
    with torch.inference_mode():
        states = []
        for _ in range(2):
            cache = target.new_cache(1, 90)
            target.prefill(text, torch.tensor([70], dtype=torch.int32), cache)
            states.append(cache)
        tree = target.forward(nodes, depth, torch.tensor(sees)[None, :, None], states[0])[0]
        for node in path:
            alone = target.forward(nodes[:, [node]], torch.zeros(1, 1), causal(1, 1, nodes.device), states[1])[0, 0]
            assert torch.equal(tree[node], alone)
            states[1].advance(torch.ones(1, dtype=torch.int64))


def _hook(target):
    target.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)


def _wrapped(target):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = target.model.layers[0].mlp.up_proj
    target.model.layers[0].mlp.up_proj = Doubled(old.in_features, old.out_features, bias=False)


def _odd_norm(target):
    target.model.layers[1].input_layernorm = nn.LayerNorm(64)


def _own_forward(target):
    def forward(self, *args, **kwargs):
        return 0.5 * type(self).forward(self, *args, **kwargs)

    target.model.layers[1].forward = types.MethodType(forward, target.model.layers[1])


@pytest.mark.parametrize(
    "change, says",
    [
        (_hook, "1 as one op, 1 by their modules (LlamaMLP has hooks)"),
        (_wrapped, "1 as one op, 1 by their modules (LlamaMLP.up_proj is no plain linear layer (Doubled))"),
        (_odd_norm, "1 as one op, 1 by their modules (LayerNorm is no RMS norm)"),
        (_own_forward, "1 as one op"),
    ],
    ids=["a hook", "another linear layer", "another norm", "another forward"],
)
def test_a_changed_layer_runs_as_the_model_has_it(change, says):
    target = small_target()
    tokens_of(target)
    change(target)
    want = target.generate(**prompt(), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = tokens_of(target, small_draft(target))
    assert torch.equal(found.sequences, want)
    assert found.report.layers == says


def test_an_activation_that_the_op_has_not_is_said():
    found = tokens_of(small_target(hidden_act="relu"))
    assert found.report.layers == "0 as one op, 2 by their modules (its activation is ReLU)"


def test_layers_without_an_attention_as_llama_s_are_said():
    target = small_target("gpt_neox", num_key_value_heads=4)
    assert tokens_of(target).report.layers.startswith("all by their modules")


def test_weights_that_change_are_seen():
    target = agreeable_target()
    before = tokens_of(target).sequences
    with torch.no_grad():
        for layer in target.model.layers:
            layer.mlp.down_proj.weight.mul_(-3)
    want = target.generate(**prompt(), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens_of(target).sequences, want) and not torch.equal(before, want)


def test_many_rows_go_by_the_modules_and_give_the_same():
    target = small_target("qwen3")
    want = target.generate(**prompt(6), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens_of(target, small_draft(target), 6, tree=TreeShape(4, 2, 8)).sequences, want)


def test_states_that_change_between_layers_are_refused():
    """Layers run together where first use saw each take just what the one before gave."""
    target = Target(small_target())
    cache, step = target.new_cache(1, 40), torch.zeros(1, 1, dtype=torch.int64)

    def forward():
        return target.forward(step + 5, step, causal(1, 1, step.device), cache)

    with torch.inference_mode():
        forward()
        second = target._view.layers[1]
        second.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
        with pytest.raises(RuntimeError, match="given other states"):
            forward()
