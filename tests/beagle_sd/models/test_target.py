"""Targets: what is refused, what a tree forward gives, and that the user's model comes back untouched."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, VOCAB, small_draft, small_target
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from beagle_kernels.reference.build_tree import pack
from beagle_sd import UnsupportedTarget, generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.target import Target
from bench.answers.kinds.tiny_targets import tiny_target

_SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)


def tiny(kind: str, make=AutoModelForCausalLM, **settings):
    """A random model of a kind that `small_target` does not make."""
    return make.from_config(AutoConfig.for_model(kind, **{**_SIZES, **settings})).eval()


def unknown_scale():
    """A model that does to its logits what no config says."""
    target = small_target()
    target.register_forward_hook(lambda module, given, out: out.__setitem__("logits", 1.5 * out.logits))
    return target


REFUSED = {
    "a cache of its own": (lambda: tiny_target("minimax"), "MiniMaxModel cannot run over a cache that transformers"),
    "no cache of transformers": (lambda: tiny("openai-gpt"), "keeps nothing of a text in transformers' cache"),
    "keys chosen by an indexer": (lambda: tiny_target("deepseek_v32"), "gives its attention indices"),
    "compressed keys": (lambda: tiny_target("deepseek_v4"), "keeps more than keys and values in layer 0"),
    "an unknown scale of the logits": (unknown_scale, "logits of LlamaForCausalLM are not its LM head's"),
    "ALiBi": (lambda: tiny("falcon", alibi=True), "falcon has ALiBi"),
    "its own attention": (
        lambda: tiny("falcon", multi_query=False),
        "FalconForCausalLM does not take registered attention",
    ),
    "head with a bias": (lambda: tiny("phi"), "LM head has a bias"),
    "no head": (lambda: tiny("llama", AutoModel), "has no LM head"),
    "encoder-decoder": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
        ),
        "t5 is an encoder-decoder",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(reason):
    make, message = REFUSED[reason]
    with pytest.raises(UnsupportedTarget, match=message + ".*allowed"):
        generate(make(), None, torch.ones(1, 3, dtype=torch.int64))


def test_heads_are_what_the_layers_have():
    """Whatever the config says of key heads: GPT-NeoX ignores that field."""
    target, ids = tiny("gpt_neox", num_key_value_heads=2), torch.ones(1, 3, dtype=torch.int64)
    want = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert generate(target, None, ids, max_new_tokens=8, eos_token_id=[]).sequences.equal(want)


ROPES = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 24, "texts of at most 24 tokens"),
    "longrope": (
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        100,
        "texts of at most 24 tokens with the new ones, or prompts of more than 24",
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_angles_that_would_change_within_a_text_are_refused(kind):
    """Up to where they change, and for longrope beyond, the text is the model's own."""
    rope, most, message = ROPES[kind]
    target = small_target(rope_parameters=rope, max_position_embeddings=most)
    draft = small_draft(target)
    for length in (10, 40):
        ids = torch.randint(VOCAB, (1, length))
        if length > 24 and kind == "dynamic":
            continue
        want = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        assert generate(target, draft, ids, max_new_tokens=14, tree=TreeShape(3, 3, 12)).sequences.equal(want)
    with pytest.raises(UnsupportedTarget, match=f"'{kind}', whose angles change at 24 tokens.*allowed: {message}"):
        generate(target, draft, torch.randint(VOCAB, (1, 10)), max_new_tokens=15)


def test_texts_beyond_learned_positions_are_refused():
    target, ids = tiny("gpt2", n_positions=20), torch.randint(VOCAB, (1, 12))
    assert generate(target, None, ids, max_new_tokens=8).sequences.shape == (1, 20)
    with pytest.raises(UnsupportedTarget, match="gpt2 has 20 positions; prompt and new tokens need 21; allowed: 20"):
        generate(target, None, ids, max_new_tokens=9)


PLAIN_HEADS = {
    **{kind: {} for kind in ("gemma", "phi3", "olmo2", "glm", "nemotron", "gpt_neox")},
    "smollm3": {"tie_word_embeddings": True},
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
SCALED = {
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.5},
    "hyperclovax": {"embedding_multiplier": 3.0, "logits_scaling": 0.25},
    "cohere": {},
    "gemma2": {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0},
    "nanochat": {"final_logit_softcapping": 2.0},
}


def other_target(kind: str, **settings):
    heads = {} if kind == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 16}
    own = {**PLAIN_HEADS, **EXPERTS, **SCALED}[kind]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return tiny(kind, initializer_range=0.3, **{**heads, **ends, **own, **settings})


@pytest.mark.parametrize("kind", [*PLAIN_HEADS, *EXPERTS, *SCALED])
def test_other_architectures_decode_as_transformers_does(kind):
    """Greedy as the model's own generate, sampled as plain decoding."""
    target = other_target(kind)
    draft, ids = small_draft(target), torch.randint(VOCAB, (1, 9))
    want = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert torch.equal(generate(target, None, ids, max_new_tokens=16).sequences, want)
    tree = {"max_new_tokens": 16, "tree": TreeShape(3, 3, 12)}
    assert torch.equal(generate(target, draft, ids, **tree).sequences, want)
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    want = generate(target, None, ids, max_new_tokens=16, **sampled).sequences
    assert torch.equal(generate(target, draft, ids, **tree, **sampled).sequences, want)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scales_and_caps_are_the_models_own(kind, tied):
    """The head's logits, what the draft embeds and what its own head gives are what the model computes."""
    model = other_target(kind, tie_word_embeddings=tied)
    draft = small_draft(model, draft_vocab=torch.arange(1, VOCAB, 3))
    target, ids, seen = Target(model), torch.randint(VOCAB, (2, 7)), []
    model.base_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    with torch.no_grad():
        want = model(ids).logits
        states = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(target.head(states), want)
        torch.testing.assert_close(draft.logits(states), want[..., 1::3])
        embedded = draft.embed(ids)
    if kind == "nanochat":  # norms what it embeds
        embedded = model.base_model.norm(embedded)
    torch.testing.assert_close(embedded, seen[0])
    assert (target.head.scale, target.head.cap) != (1.0, None)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_tree_forward_equals_each_path_alone(kind):
    """Two ragged rows, two different trees: every node's state is that of its own path read as plain text."""
    model = small_target(kind)
    target = Target(model)
    prompts, lengths = torch.randint(VOCAB, (2, 9)), torch.tensor([9, 4], dtype=torch.int32)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 5], [-1, 0, 1, 2, 3, 4, 5]])
    nodes = torch.randint(VOCAB, (2, 7))
    among, depth = torch.eye(7, dtype=torch.bool).repeat(2, 1, 1), torch.zeros(2, 7, dtype=torch.int64)
    for row in range(2):
        for node in range(1, 7):
            among[row, node] |= among[row, parents[row, node]]
            depth[row, node] = depth[row, parents[row, node]] + 1
    with torch.inference_mode():
        alone = {}
        for row in range(2):
            for node in range(7):
                text = torch.cat((prompts[row, : lengths[row]], nodes[row, among[row, node]]))
                alone[row, node] = model.model(text[None]).last_hidden_state[0, -1]
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            cache = target.new_cache(2, 20)
            target.prefill(prompts, lengths, cache)
            states = target.forward(nodes, depth, pack(among), cache)
            assert torch.equal(cache.lengths, lengths), "the caller says what was accepted"
            for (row, node), want in alone.items():
                torch.testing.assert_close(states[row, node], want, rtol=1e-4, atol=1e-4)


def test_prefill_in_chunks_equals_one_pass(monkeypatch):
    model = small_target()
    target, tokens = Target(model), torch.randint(VOCAB, (2, 23))
    lengths = torch.tensor([23, 10], dtype=torch.int32)
    monkeypatch.setattr("beagle_sd.models.target.AT_ONCE", 5)
    with torch.inference_mode():
        cache = target.new_cache(2, 23)
        states = target.prefill(tokens, lengths, cache)
        assert torch.equal(cache.lengths, lengths) and cache.get_seq_length() == 23
        for row, length in enumerate(lengths):
            plain = model.model(tokens[row : row + 1, :length]).last_hidden_state[0]
            torch.testing.assert_close(states[row, :length], plain, rtol=1e-4, atol=1e-4)


def test_a_full_cache_says_so():
    target = Target(small_target())
    cache = target.new_cache(1, 4)
    with pytest.raises(ValueError, match="the cache has 4 slots a row; 5 are needed"):
        target.prefill(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5]), cache)


class Interruption(Exception):
    """What a user's streamer may raise."""


class Interrupting:
    def put(self, value):
        raise Interruption

    def end(self):
        pass


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_users_model_comes_back_as_it_was(implementation):
    model = small_target(attention_dropout=0.3)
    model.set_attn_implementation(implementation)
    model.model.layers[1].mlp.train()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    draft, ids = small_draft(model), torch.randint(VOCAB, (1, 6))
    for streamer in (None, Interrupting()):
        try:
            generate(model, draft, ids, max_new_tokens=6, streamer=streamer)
            assert streamer is None
        except Interruption:
            assert streamer is not None
        assert model.config._attn_implementation == implementation
        assert model.model.config._attn_implementation == implementation
        assert model.config.to_dict() == config
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False),
        generate(model, draft, ids, max_new_tokens=6).sequences,
    )


def test_training_goes_on_after_generating():
    """No tensor that decoding made (in inference mode) is left in model or draft."""
    model = small_target()
    draft = small_draft(model, draft_vocab=torch.arange(0, VOCAB, 2))
    generate(model, draft, torch.randint(VOCAB, (2, 6)), max_new_tokens=6)
    draft.logits(draft.block(draft.embed(torch.arange(3)), torch.zeros(3, 4, 16))).sum().backward()
    model.train()(torch.randint(VOCAB, (1, 5))).logits.sum().backward()
    assert draft.up_proj.weight.grad is not None and model.lm_head.weight.grad is not None
