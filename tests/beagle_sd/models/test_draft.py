"""The draft model: built from targets, saved and loaded, and blind to its own diagonal."""

from __future__ import annotations

import json

import pytest
import torch
from models import ARCHITECTURES, VOCAB, small_draft, small_target
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from beagle_sd import BeagleConfig, BeagleDraft, generate
from beagle_sd.data.batch import Batch
from beagle_sd.training.objective import block_states, simulated_states


def make_batch(count: int = 12, width: int = 64) -> Batch:
    return Batch(
        torch.randint(VOCAB, (count,)),
        torch.randn(count, width),
        torch.ones(count, dtype=torch.bool),
        torch.tensor([0, count], dtype=torch.int32),
        torch.arange(count),
    )


def outputs(draft: BeagleDraft) -> torch.Tensor:
    """Everything a draft computes, on fixed input."""
    torch.manual_seed(9)
    with torch.no_grad():
        states = simulated_states(draft, make_batch(), make_batch().states, 4, torch.tensor([1], dtype=torch.int32))
        return draft.logits(states.to(draft.q_proj.weight.dtype))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_draft_has_its_targets_shape(kind):
    target = small_target(kind)
    draft = small_draft(target)
    config = draft.config
    assert (config.hidden_size, config.num_attention_heads) == (64, 4)
    assert (config.num_key_value_heads, config.head_dim) == (2, 16)
    assert (config.target_type, config.vocab_size, config.draft_vocab_size) == (kind, VOCAB, None)
    assert config.rope_parameters["rope_theta"] == target.config.rope_parameters["rope_theta"]
    shapes = {name: tuple(parameter.shape) for name, parameter in draft.named_parameters()}
    assert shapes == {
        "q_proj.weight": (64, 64),
        "k_proj.weight": (32, 64),
        "v_proj.weight": (32, 64),
        "o_proj.weight": (64, 64),
        "gate_proj.weight": (96, 64),
        "up_proj.weight": (96, 64),
        "down_proj.weight": (64, 96),
        "norm_query.weight": (64,),
        "norm_state.weight": (64,),
        "norm_mlp.weight": (64,),
        "norm_output.weight": (64,),
    }
    tokens, positions = torch.arange(5), torch.arange(5)
    embedded = draft.embed(tokens)
    torch.testing.assert_close(embedded, target.get_input_embeddings().weight[:5])
    keys, values = draft.keys_values(embedded, positions)
    assert draft.queries(embedded, positions).shape == (5, 4, 16) and keys.shape == values.shape == (5, 2, 16)
    states = draft.block(embedded, torch.zeros(5, 4, 16))
    assert states.shape == (5, 64) and draft.logits(states).shape == (5, VOCAB)


def test_turning_is_the_targets_own():
    """Queries and keys turn as transformers' Llama turns them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    target = small_target()
    draft = small_draft(target, norm_query=False)
    x, positions = torch.randn(6, 64), torch.tensor([0, 1, 5, 5, 300, 2])
    cos, sin = target.model.rotary_emb(x[None], positions[None])
    plain = draft.q_proj(x).view(1, 6, 4, 16).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(plain, plain, cos, sin)
    torch.testing.assert_close(draft.queries(x, positions), want[0].transpose(0, 1))


@pytest.mark.parametrize("name", ["norm_query", "norm_state", "norm_output"])
def test_norms_can_be_switched_off(name):
    target = small_target()
    draft = small_draft(target, **{name: False})
    assert f"{name}.weight" not in dict(draft.named_parameters())
    assert not torch.allclose(outputs(draft), outputs(small_draft(target)))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma", "nemotron"])
def test_the_output_norm_begins_as_the_targets_final_norm(kind):
    """Also where the target adds one to what it stores, or subtracts the mean and adds a bias."""
    target = small_target(kind)
    with torch.no_grad():
        for parameter in target.model.norm.parameters():
            parameter.copy_(torch.rand(64))
    stored = target.model.norm.weight.detach()
    want = stored + 1 if kind in ("gemma", "nemotron") else stored
    torch.testing.assert_close(small_draft(target).norm_output.weight, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"append_states": False, "norm_state": False}, {"draft_vocab": torch.arange(1, VOCAB, 3)}], ids=str
)
def test_saving_and_loading(settings, tmp_path):
    target = small_target()
    draft = small_draft(target, **settings)
    draft.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    buffers = {"draft_vocab"} if "draft_vocab" in settings else set()
    assert names == {name for name, _ in draft.named_parameters()} | buffers
    assert not any("embed" in name or "head" in name for name in names)
    again = BeagleDraft.from_pretrained(tmp_path).bind(target)
    assert torch.equal(outputs(again), outputs(draft))
    assert again.config.to_dict() == {**draft.config.to_dict(), "_name_or_path": str(tmp_path)}
    if buffers:
        assert torch.equal(again.draft_vocab, settings["draft_vocab"]) and again.head.shape == (32, 64)
        assert torch.equal(again.head, target.lm_head.weight[1::3])


def test_casting_keeps_the_angles_exact(tmp_path):
    """In bf16, frequencies would be wrong by up to 0.4%: a whole radian at position 300."""
    target = small_target()
    draft = small_draft(target)
    draft.save_pretrained(tmp_path)
    exact = draft.rotary.inv_freq.clone()
    loaded = BeagleDraft.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (loaded, draft.to(torch.bfloat16), draft.half(), draft.double()):
        assert torch.equal(cast.rotary.inv_freq, exact)


def test_a_config_survives_its_file(tmp_path):
    config = BeagleConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        append_states=False,
        window_keys=9,
        draft_vocab_size=7,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    config.save_pretrained(tmp_path)
    assert BeagleConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_config_from_before_windows_shows_all_keys(tmp_path):
    config = BeagleConfig().to_dict()
    del config["window_keys"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert BeagleConfig.from_pretrained(tmp_path).window_keys is None


def test_a_window_without_keys_is_refused():
    with pytest.raises(ValueError, match="window_keys is 0; allowed: 1 or more, or None, which shows all keys"):
        small_draft(small_target(), window_keys=0)


def test_a_config_of_transformers_4_is_refused(tmp_path):
    """It has rope_theta alone, which transformers 5 would not read."""
    config = BeagleConfig().to_dict()
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no rope_parameters, as transformers 4 wrote it; allowed: by transformers 5"):
        BeagleConfig.from_pretrained(tmp_path)


def test_a_target_with_rope_theta_alone_gives_the_draft_its_angles():
    """As models of their own code have it."""
    config = small_target().config
    want, config.rope_parameters = dict(config.rope_parameters), None
    config.rope_theta = want["rope_theta"]
    assert BeagleConfig.of_target(config).rope_parameters == want


def test_a_draft_is_for_one_target_only():
    draft = small_draft(small_target())
    with pytest.raises(ValueError, match="llama target with hidden_size=64 .*; given a qwen2 with hidden_size=32"):
        draft.bind(small_target("qwen2", hidden_size=32))
    with pytest.raises(ValueError, match="vocab_size=97; given a llama with .*vocab_size=50"):
        draft.bind(small_target(vocab_size=50))


@pytest.mark.parametrize("reduced", [None, torch.arange(0, VOCAB, 2)], ids=["all tokens", "some"])
def test_a_vocabulary_resized_after_training(reduced):
    target, ids = small_target(tie_word_embeddings=False), torch.arange(1, 9)[None]
    draft = small_draft(target, draft_vocab=reduced)
    before = draft.head.clone()
    target.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    with torch.no_grad():
        target.lm_head.weight[VOCAB:].copy_(100 * target.lm_head.weight[:8])  # new tokens that the target likes
    want = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(target, draft, ids, max_new_tokens=12).sequences, want) and int(want.max()) >= VOCAB
    assert torch.equal(draft.head, before)
    target.resize_token_embeddings(VOCAB - 9)
    with pytest.raises(ValueError, match="allowed: that target, its vocabulary resized to 97 or more"):
        draft.bind(target)


def test_a_draft_needs_a_target(tmp_path):
    small_draft(small_target()).save_pretrained(tmp_path)
    draft = BeagleDraft.from_pretrained(tmp_path)
    for use in (
        lambda: draft.target,
        lambda: draft.embed(torch.zeros(1, dtype=torch.int64)),
        lambda: draft.logits(torch.zeros(1, 64)),
    ):
        with pytest.raises(RuntimeError, match=r"no target yet: call draft.bind\(target\)"):
            use()


def test_another_vocabulary_for_the_same_weights(tmp_path):
    target = small_target()
    draft = small_draft(target, draft_vocab=torch.arange(0, VOCAB, 2))
    other = torch.arange(1, VOCAB, 3)
    for chosen in (other, None, other):
        assert draft.set_draft_vocab(chosen) is draft
        assert draft.head.equal(target.lm_head.weight if chosen is None else target.lm_head.weight[chosen])
        draft.save_pretrained(tmp_path)
        again = BeagleDraft.from_pretrained(tmp_path).bind(target)
        assert again.head.equal(draft.head) and again.config.draft_vocab_size == (None if chosen is None else 32)
    with pytest.raises(ValueError, match="draft_vocab has 2 ids from"):
        draft.set_draft_vocab(torch.tensor([5, 4]))
    assert draft.draft_vocab.equal(other)


@pytest.mark.parametrize("ids", [[], [3, 3], [5, 4], [-1, 2], [0, VOCAB]], ids=str)
def test_a_wrong_draft_vocabulary_is_refused(ids):
    with pytest.raises(ValueError, match=r"draft_vocab has .*; allowed: .* in \[0, 97\)"):
        small_draft(small_target(), draft_vocab=torch.tensor(ids, dtype=torch.int64))


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    small_draft(small_target()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short .*; allowed: a whole file"):
        BeagleDraft.from_pretrained(tmp_path)


def test_a_missing_weight_is_named_not_made_up(tmp_path):
    small_draft(small_target()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['up_proj.weight'\]"):
        BeagleDraft.from_pretrained(tmp_path)


def test_another_models_folder_is_refused(tmp_path):
    small_target().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config is of a llama model; allowed: beagle"):
        BeagleDraft.from_pretrained(tmp_path)


def test_the_diagonal_is_never_visible():
    """With windows of one token S_i depends on H_0 .. H_{i-1}; H_i and anything after change nothing."""
    draft = small_draft(small_target(), initializer_range=0.2)
    batch, offset = make_batch(), torch.tensor([0], dtype=torch.int32)
    with torch.no_grad():
        before = block_states(draft, batch, batch.states, 1, offset)
        for row in (0, 4, 11):
            states = batch.states.clone()
            states[row] += 1.0
            changed = (block_states(draft, batch, states, 1, offset) != before).any(1)
            assert changed.tolist() == [other > row for other in range(12)]


def test_a_draft_state_is_seen_by_later_rows_of_its_window_only():
    """In simulation S_i moves what comes after it in the window, never itself: through its key, by gradient."""
    draft = small_draft(small_target(), initializer_range=0.2)
    batch, offset = make_batch(), torch.tensor([0], dtype=torch.int32)
    embedded = draft.target.embedding.weight.detach().clone().requires_grad_()
    draft.embed = lambda tokens: embedded[tokens]
    tokens = torch.randperm(VOCAB)[:12]
    states = simulated_states(draft, batch._replace(tokens=tokens), batch.states, 4, offset)
    for row in range(12):
        (gradient,) = torch.autograd.grad(states[row].pow(2).sum(), embedded, retain_graph=True)
        moved = gradient[tokens].abs().sum(1) > 1e-9
        assert moved.tolist() == [row - row % 4 <= other <= row for other in range(12)]


def test_a_draft_for_partly_turned_heads():
    """Targets that turn only part of each head (nemotron: half) get drafts that turn all of it."""
    target = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "nemotron",
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    assert target.config.rope_parameters["partial_rotary_factor"] == 0.5
    draft = small_draft(target)
    assert draft.queries(torch.randn(3, 64), torch.arange(3)).shape == (3, 4, 16)
