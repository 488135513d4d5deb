"""What a target's config does not tell is found on its first use, and named."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from decoding_cases import greedy, prompts
from models import small_draft, small_target
from torch import nn

from beagle_sd import UnsupportedTarget, generate
from beagle_sd.models import first_use


def own_mask():
    """Attention that sees the last three tokens only, whatever its mask says."""
    target = small_target()
    attend = target.model.layers[1].self_attn.forward

    def windowed(hidden_states, position_embeddings, attention_mask=None, **kwargs):
        count = hidden_states.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool).tril().triu(-2)[None, None]
        return attend(hidden_states, position_embeddings=position_embeddings, attention_mask=mask, **kwargs)

    target.model.layers[1].self_attn.forward = windowed
    return target


def quantized_by_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = small_target()
        target.model = torch.ao.quantization.quantize_dynamic(target.model, {nn.Linear}, dtype=torch.qint8)
        return target


def quantized_head():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(small_target(), {nn.Linear}, dtype=torch.qint8)


def adapted_head():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    return peft.get_peft_model(small_target(tie_word_embeddings=False), config).eval()


def head_of_its_own():
    target = small_target()
    target.lm_head.register_forward_hook(lambda module, given, out: out.roll(1, -1))
    return target


REFUSED = {
    "a mask of its own": (own_mask, "gives other states for|cannot run over a cache"),
    "activations quantised by scales that rows share": (
        quantized_by_rows,
        "the start of a text in a batch, by its own",
    ),
    "a quantised head": (quantized_head, r"LM head is a torch\.ao\..*Linear, whose weight is no tensor"),
    "an adapter on the head": (adapted_head, r"LM head has an adapter \(peft"),
    "a head that is more than its weight": (head_of_its_own, "other values than the product with its weight"),
    "an offloaded head": (lambda: cpu_offload(small_target(), torch.device("cpu")), "LM head is offloaded"),
    "float64": (lambda: small_target().double(), "the target is in torch.float64"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_give_other_tokens_is_refused(reason):
    make, message = REFUSED[reason]
    target = make()
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(UnsupportedTarget, match=f"({message}).*allowed"):
            generate(target, None, prompts(1))
    with pytest.raises(UnsupportedTarget, match="allowed"):
        small_draft(target)


def test_a_model_is_tried_once_and_again_when_its_modules_are_others(monkeypatch):
    target, tried = small_target(tie_word_embeddings=False), []
    compare = first_use._compare
    monkeypatch.setattr(first_use, "_compare", lambda target: tried.append(compare(target)))
    draft = small_draft(target)
    generate(target, draft, prompts(1), max_new_tokens=2)
    assert len(tried) == 1
    target.model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    generate(target, draft, prompts(1), max_new_tokens=2)
    generate(target.to(torch.bfloat16), draft, prompts(1), max_new_tokens=2)
    assert len(tried) == 3


def test_broken_weights_are_told_of_where_their_logits_are_used():
    target = small_target()
    target.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="row 0: the target gave no finite logit"):
        generate(target, None, prompts(1))


def test_experts_and_16_bits_are_no_reason():
    """Rounding sends tokens to other experts: as much as the model's own forwards differ by."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    for dtype in (torch.bfloat16, torch.float16):
        for seed in range(3):
            target = small_target("qwen3_moe", seed=seed, **sizes).to(dtype)
            assert generate(target, None, prompts(1), max_new_tokens=2).sequences.shape == (1, 13)


def test_a_soft_cap_of_zero_is_off():
    target, ids = small_target(attn_logit_softcapping=0.0), prompts(1)
    assert torch.equal(generate(target, None, ids, max_new_tokens=8).sequences, greedy(target, ids, max_new_tokens=8))


def test_a_soft_cap_that_the_models_own_attention_leaves_out_is_refused_with_the_remedy():
    """As transformers 5.17 runs Gemma 2 unless told otherwise; newer versions refuse it themselves."""
    target = small_target("gemma2", layer_types=["full_attention"] * 2, pad_token_id=0)
    target.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedTarget, match="(caps its scores|does not support `softcap`).*eager"):
        generate(target, None, prompts(1))
    target.set_attn_implementation("eager")
    generate(target, None, prompts(1), max_new_tokens=2)
    target.config._attn_implementation = "sdpa"  # what was fine once is asked again
    with pytest.raises(ValueError, match="(caps its scores|does not support `softcap`).*eager"):
        generate(target, None, prompts(1))


def test_a_soft_cap_of_zero_that_the_model_applies_is_refused():
    """Gemma 2's own attention divides by it: every key counts alike."""
    target = small_target("gemma2", layer_types=["full_attention"] * 2, attn_logit_softcapping=0.0, pad_token_id=0)
    with pytest.raises(UnsupportedTarget, match="gives other states for a plain text"):
        generate(target, None, prompts(1))
