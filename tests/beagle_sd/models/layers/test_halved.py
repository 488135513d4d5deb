"""Weights kept in bf16 beside those in fp32: the same results to the last bit, and nothing that has changed is read."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, small_draft, small_target

from beagle_sd import generate, halve_
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.layers.halved import halved_weight
from beagle_sd.models.target import Target

PROMPT = torch.tensor([[5, 9, 60, 2, 7]])


def rounded_target(kind: str = "llama", **overrides):
    """A target whose weights bf16 holds, as checkpoints are saved."""
    return small_target(kind, **overrides).bfloat16().float()


def answer(target, draft=None, **kwargs):
    given = {"max_new_tokens": 24, "eos_token_id": [], "pad_token_id": 0, **kwargs}
    return generate(target, draft, PROMPT, **given)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_results_are_those_of_fp32_to_the_last_bit(kind, temperature):
    overrides = {"pad_token_id": 0} if kind == "phi3" else {}
    target = rounded_target(kind, **overrides)
    draft = small_draft(target).bfloat16().float().bind(target)
    given = {"temperature": temperature, "seed": 4, "return_logprobs": True}
    for tree in (TreeShape(3, 2, 7), TreeShape(2, 1, 3)):
        want = answer(target, draft, tree=tree, **given)
        halve_(target), halve_(draft)
        found = answer(target, draft, tree=tree, **given)
        assert torch.equal(found.sequences, want.sequences) and torch.equal(found.logprobs, want.logprobs)
        assert found.report.acceptance_by_depth == want.report.acceptance_by_depth


def test_every_linear_layer_that_bf16_holds_has_its_half():
    target = rounded_target()
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight[3, 4] = 1.0 + 2**-12
    assert halve_(target) is target
    without = [
        name
        for name, module in target.named_modules()
        if isinstance(module, torch.nn.Linear) and halved_weight(module) is None
    ]
    assert without == ["model.layers.1.mlp.up_proj"]
    assert all(parameter.dtype == torch.float32 for parameter in target.parameters())
    assert not any("half" in name for name in target.state_dict())


def test_tied_weights_are_kept_once():
    target = rounded_target(tie_word_embeddings=True, num_hidden_layers=1)
    halve_(target)
    assert Target(target).head.half.shape == (VOCAB, 64)
    again = halve_(target)
    assert Target(again).head.half.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["in place", "through data", "another parameter", "another dtype"])
def test_a_weight_that_changed_is_read_itself(how):
    target = halve_(rounded_target())
    before = answer(target).sequences
    for layer in target.model.layers:
        weight = layer.mlp.down_proj.weight
        if how == "in place":
            with torch.no_grad():
                weight.mul_(-2)
        elif how == "through data":
            weight.data.mul_(-2)
        elif how == "another parameter":
            layer.mlp.down_proj.weight = torch.nn.Parameter(weight.detach() * -2)
        assert how == "another dtype" or halved_weight(layer.mlp.down_proj) is None
    if how == "another dtype":
        target.double().float()
    want = target.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(answer(target).sequences, want)
    assert torch.equal(before, want) == (how == "another dtype")


def test_a_changed_head_reaches_the_draft():
    target = halve_(rounded_target())
    draft = small_draft(target)
    before = draft.head.clone()
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(2)
    assert torch.equal(draft.bind(target).head, 2 * before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"weight in {dtype} on cpu; allowed: models in float32 on a CPU"):
        halve_(small_target().to(dtype))
