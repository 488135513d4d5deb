"""Weights in int8: what they stand for, what is put into int8 and what is refused, and texts decoded with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, agreeable_target, small_draft, small_target
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import beagle_sd
from beagle_kernels import int8_linear
from beagle_sd import TreeShape, UnsupportedTarget, generate, quantize_
from beagle_sd.models.head import head_of
from beagle_sd.models.layers.int8 import Int8Linear, Int8Matrix
from beagle_sd.models.layers.linears import linear
from beagle_sd.models.target import Target

SIZES = {"intermediate_size": 128, "num_hidden_layers": 2}
"""Widths that groups of 64 divide."""


def target(**overrides):
    return agreeable_target(**SIZES | overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_matrix_is_the_nearest_in_its_groups(group, dtype):
    weight = torch.randn(24, 128).to(dtype)
    weight[3] = 0
    weight[5, :32] = 1e-42  # denormal in fp32, and nothing in bf16
    matrix = Int8Matrix.of(weight, group)
    assert matrix.integers.dtype == torch.int8 and matrix.scales.shape == (24, 128 // group)
    assert int(matrix.integers.abs().max()) == 127 and not matrix.integers[3].any()
    apart = (matrix.floats() - weight.float()).view(24, -1, group).abs().amax(-1)
    assert (apart <= matrix.scales * 0.5001 + 1e-40).all()
    assert matrix.floats(torch.bfloat16).dtype == torch.bfloat16
    rows = torch.tensor([2, 7])
    part = matrix[rows] * 0.5
    assert len(part) == 2 and torch.equal(part.floats(), matrix.floats()[rows] * 0.5)
    assert torch.equal(matrix[:5].floats(), matrix.floats()[:5])


def test_linear_and_the_layer_go_through_the_op():
    x, layer = torch.randn(2, 3, 64), nn.Linear(64, 40)
    matrix = Int8Matrix.of(layer.weight)
    want = int8_linear(x, matrix.integers, matrix.scales)
    with torch.no_grad():
        assert torch.equal(linear(x, matrix), want) and torch.equal(linear(x, matrix, layer.bias), want + layer.bias)
        made = Int8Linear(matrix, layer.bias)
        assert torch.equal(made(x), want + layer.bias) and made(x.bfloat16()[:, :0]).shape == (2, 0, 40)
    assert repr(made) == "Int8Linear(in_features=64, out_features=40, group=64, bias=True)"
    assert set(made.state_dict()) == {"weight", "scales", "bias"}


def test_a_layer_keeps_its_scales_in_fp32_and_takes_a_state_dict():
    made = Int8Linear(Int8Matrix.of(torch.randn(40, 64)), nn.Parameter(torch.randn(40)))
    other = Int8Linear(Int8Matrix.of(torch.randn(40, 64)), nn.Parameter(torch.randn(40)))
    other.load_state_dict(made.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(other(x), made(x))
    scales = made.scales.clone()
    cast = copy.deepcopy(made).to(torch.bfloat16)
    assert cast.bias.dtype == torch.bfloat16 and cast.scales.dtype == torch.float32 and torch.equal(cast.scales, scales)
    assert cast(x.bfloat16()).dtype == torch.bfloat16
    assert made.to("meta").scales.is_meta


def test_a_gradient_goes_through_as_through_the_matrix():
    matrix, x = Int8Matrix.of(torch.randn(40, 64)), torch.randn(3, 64, requires_grad=True)
    up = torch.randn(3, 40)
    out = linear(x, matrix)
    assert torch.equal(out, int8_linear(x.detach(), matrix.integers, matrix.scales))
    (grad,) = torch.autograd.grad(out, x, up)
    torch.testing.assert_close(grad, up @ matrix.floats())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_put_into_int8(kind, tied):
    model = target(kind=kind, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    before, kept = embedding.clone(), {name: one.clone() for name, one in model.named_parameters()}
    names = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    logits = model(torch.arange(9)[None]).logits
    assert quantize_(model) is model
    assert {name for name, one in model.named_modules() if isinstance(one, Int8Linear)} == names
    assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, before)
    assert all(torch.equal(one, kept[name]) for name, one in model.named_parameters())  # norms and biases too
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == (kind == "qwen2")
    model.tie_weights()
    assert isinstance(model.lm_head, Int8Linear)
    after = model(torch.arange(9)[None]).logits
    assert F.cosine_similarity(after.flatten(), logits.flatten(), 0) > 0.999
    again = quantize_(target(kind=kind, tie_word_embeddings=tied, seed=5))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(torch.arange(9)[None]).logits, after)


def test_a_target_s_head_and_a_draft_s():
    """Rows of the target's integers, not integers of their own; matrices made of them where training asks."""
    model = quantize_(target(kind="cohere", logit_scale=0.5, tie_word_embeddings=True))
    head, states = head_of(model), torch.randn(4, 64)
    whole = int8_linear(states, model.lm_head.weight, model.lm_head.scales)
    assert torch.equal(head(states), whole * 0.5) and head.size == VOCAB and head.device.type == "cpu"
    assert head.weight.dtype == torch.float32 and torch.equal(head.weight, model.lm_head.matrix.floats())
    assert Target(model).dtype == torch.float32 and Target(model).is_int8
    draft = small_draft(model)
    assert torch.equal(draft.head, head.weight * 0.5) and draft.vocab == VOCAB
    ids = torch.tensor([3, 8, 90])
    draft.set_draft_vocab(ids)
    assert draft.vocab == 3 and torch.equal(draft.head, head.weight[ids] * 0.5)
    want = int8_linear(states, model.lm_head.weight[ids], model.lm_head.scales[ids] * 0.5)
    assert torch.equal(draft.logits(states), want)


def test_a_draft_in_int8_decodes_and_is_neither_saved_nor_trained(tmp_path):
    model = target()
    draft = small_draft(model).quantize_()
    assert draft.is_int8 and not any(isinstance(one, nn.Linear) for one in draft.modules())
    found = generate(model, draft, torch.arange(7)[None], max_new_tokens=24, tree=TreeShape(3, 2, 6))
    plain = generate(model, None, torch.arange(7)[None], max_new_tokens=24)
    assert torch.equal(found.sequences, plain.sequences) and found.report.tokens_per_round > 1
    with pytest.raises(ValueError, match="the draft is in int8; allowed: to save it before"):
        draft.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedTarget, match="q_proj is in int8 already"):
        draft.quantize_()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trees_write_what_plain_decoding_writes(dtype, sampling):
    """Token for token, in bf16 too as far as rounding goes, for rows of a batch."""
    model = quantize_(target().to(dtype))
    draft = small_draft(model).to(dtype).quantize_()
    prompts = torch.randint(VOCAB, (3, 7))
    plain = generate(model, None, prompts, max_new_tokens=40, **sampling)
    for tree in (TreeShape(4, 1, 5), TreeShape(4, 3, 8), TreeShape(4, 6, 16)):
        found = generate(model, draft, prompts, max_new_tokens=40, tree=tree, **sampling)
        assert dtype != torch.float32 or torch.equal(found.sequences, plain.sequences)
        assert (found.sequences == plain.sequences).float().mean() > 0.5


def refused(model, message: str, error=UnsupportedTarget, **settings) -> None:
    """Before anything is changed."""
    before = [id(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        quantize_(model, **settings)
    assert [id(module) for module in model.modules()] == before


def test_refusals_name_what_was_given():
    class Own(nn.Linear):
        pass

    refused(target(), "group is 48; allowed: multiples of 32", ValueError, group=48)
    refused(
        small_target(), "mlp.down_proj has 96 inputs, which groups of 64 do not divide; allowed: 32, 96", ValueError
    )
    refused(quantize_(target()), "layers.0.self_attn.q_proj is in int8 already; allowed: floating-point weights")
    odd = target()
    odd.model.layers[1].mlp.up_proj = Own(64, 128, bias=False)
    refused(odd, "layers.1.mlp.up_proj is a .*Own with a weight of torch.float32; allowed: plain nn.Linear layers")
    hooked = target()
    hooked.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, given: None)
    refused(hooked, "layers.0.mlp.up_proj is a torch.nn.modules.linear.Linear with hooks; allowed: plain")
    adapted = target()
    adapted.model.layers[0].mlp.base_layer = nn.Linear(64, 64)
    refused(adapted, r"layers.0.mlp has an adapter .*merge_and_unload\(\) in PEFT")
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=64)
    refused(AutoModelForCausalLM.from_config(gpt2).eval(), "the decoder of GPT2LMHeadModel has no nn.Linear")
    refused(target().to("meta"), "is on 'meta'; allowed: 'cpu', whose product reads int8", ValueError)
    for given in (nn.Linear(3, 3), torch.compile(target())):
        with pytest.raises(
            TypeError, match=f"quantize_ was given a {type(given).__name__}; allowed: a transformers model"
        ):
            quantize_(given)


def test_weights_by_name():
    with pytest.raises(ValueError, match="weights are 'int4'; allowed: .*int8"):
        beagle_sd.load_bundled(device="cpu", weights="int4")
