"""What vLLM cannot serve is refused before it starts, with what was given and what is allowed. No vLLM is needed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import small_target
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from beagle_sd import BeagleConfig, BeagleDraft
from beagle_sd.vllm import COUPLED, checks, lean, serve
from beagle_sd.vllm.checks import Scales, scales_of


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A target and its draft on disk, and a vLLM that looks installed."""
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    target = small_target()
    target.save_pretrained(tmp_path / "target")
    BeagleDraft.from_target(target).save_pretrained(tmp_path / "draft")
    return tmp_path / "target", tmp_path / "draft"


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_vllm_takes(folders):
    target, draft = folders
    assert serve.speculative_config(target, draft, 3) == {
        "method": "eagle",
        "model": str(draft),
        "num_speculative_tokens": 3,
        "use_local_argmax_reduction": True,
    }


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_a_vllm_that_was_not_tried(folders, monkeypatch, version):
    monkeypatch.setattr(checks, "vllm_version", lambda: version)
    with pytest.raises(ValueError, match=rf"vllm {version} is installed; allowed: vllm >= 0.32, < 0.34"):
        serve.speculative_config(*folders)


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_no_vllm(folders, monkeypatch, spec):
    monkeypatch.undo()
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"vllm is not installed here; allowed: vllm >= 0.32, < 0.34 \(pip install"):
        serve.speculative_config(*folders)


@pytest.mark.parametrize("count", [0, -1, 65, 2.0, True, None])
def test_numbers_of_tokens(folders, count):
    with pytest.raises(ValueError, match=f"num_speculative_tokens is {count}; allowed: 1 to 64"):
        serve.speculative_config(*folders, count)


def test_a_folder_that_is_no_draft(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing has no config.json; allowed: a folder that `beagle-sd train`"):
        serve.speculative_config(folders[0], tmp_path / "nothing")
    with pytest.raises(ValueError, match="the config is of a llama model; allowed: beagle"):
        serve.speculative_config(folders[0], folders[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"append_states": False}, "append_states=False; allowed in vLLM: True"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; allowed in vLLM: silu"),
        ({"hidden_size": 96}, "for a llama target with hidden_size=96"),
        ({"target_type": "qwen3"}, "for a qwen3 target"),
        ({"intermediate_size": 24}, "model.safetensors has gate_proj.weight of shape"),
        ({"draft_vocab_size": 7}, "model.safetensors lacks draft_vocab"),
    ],
)
def test_drafts_that_do_not_fit(folders, change, message):
    edited(folders[1], **change)
    with pytest.raises(ValueError, match=message):
        serve.speculative_config(*folders)


def test_weights_that_are_cut_short_or_gone(folders):
    weights = folders[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is missing, damaged or cut short"):
        serve.speculative_config(*folders)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing, damaged or cut short"):
        serve.speculative_config(*folders)


def test_a_config_that_is_no_json(folders):
    (folders[1] / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        serve.speculative_config(*folders)


def test_divisions_over_devices():
    draft = BeagleConfig(num_attention_heads=8, num_key_value_heads=2)
    for parts in (1, 2, 4, 8):
        checks.check_parallel(draft, parts, 1)
    with pytest.raises(ValueError, match="tensor_parallel_size is 3; allowed: what divides the draft's 8 query heads"):
        checks.check_parallel(draft, 3, 1)
    with pytest.raises(ValueError, match="allowed: what divides the draft's intermediate_size, 1500"):
        checks.check_parallel(BeagleConfig(num_attention_heads=8, num_key_value_heads=8, intermediate_size=1500), 8, 1)
    with pytest.raises(ValueError, match="pipeline_parallel_size is 2; allowed with a Beagle draft: 1"):
        checks.check_parallel(draft, 1, 2)


def test_scales_are_the_targets_own():
    assert scales_of(LlamaConfig()) == Scales()
    assert scales_of(CohereConfig(logit_scale=0.25)) == Scales(logits=0.25)
    granite = GraniteConfig(embedding_multiplier=12.0, logits_scaling=8.0)
    assert scales_of(granite) == Scales(embedding=12.0, logits=0.125)
    gemma = Gemma2Config(hidden_size=2304, final_logit_softcapping=30.0)
    assert scales_of(gemma) == Scales(embedding=48.0, cap=30.0)
    wide = Gemma2Config(hidden_size=3584, final_logit_softcapping=None)
    assert scales_of(wide, torch.bfloat16).embedding == 59.75 != scales_of(wide).embedding


def test_a_target_whose_scale_is_not_known_is_refused():
    with pytest.raises(ValueError, match="a llama with logit_scale=0.5, which the draft would have to apply"):
        scales_of(LlamaConfig(logit_scale=0.5))
    with pytest.raises(ValueError, match="a llama with scale_emb=12"):
        scales_of(LlamaConfig(scale_emb=12))
    assert scales_of(LlamaConfig(logit_scale=1.0, scale_emb=None)) == Scales()
    with pytest.raises(ValueError, match="a llama with embedding_multiplier=2.0.*granite, granitemoe, hyperclovax"):
        scales_of(LlamaConfig(embedding_multiplier=2.0))
    strange = LlamaConfig()
    strange.model_type = "gemma9"
    with pytest.raises(ValueError, match="a gemma9, whose scale of embeddings is not known here"):
        scales_of(strange)
    strange.model_type = "exaone"
    draft = BeagleConfig(target_type="exaone", hidden_size=strange.hidden_size, vocab_size=strange.vocab_size)
    with pytest.raises(ValueError, match="a exaone, whose embedding vLLM keeps where"):
        checks.check_target(draft, strange)


def test_the_servers_command(folders):
    target, draft = folders
    command = serve.server_command(target, draft, 2, True, ["--port", "8001", "-tp", "2"])
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[-4:] == ["--port", "8001", "-tp", "2"]
    assert json.loads(command[command.index("--speculative-config") + 1])["num_speculative_tokens"] == 2
    assert command[command.index("--logits-processors") + 1] == COUPLED
    with pytest.raises(ValueError, match="pipeline_parallel_size is 2"):
        serve.server_command(target, draft, 2, False, ["--pipeline_parallel_size=2"])
    with pytest.raises(ValueError, match="tensor_parallel_size is two; allowed: 1 or more"):
        serve.server_command(target, draft, 2, False, ["-tp", "two"])
    for option in ("--speculative-config={}", "--logits_processors", "--model"):
        with pytest.raises(ValueError, match="is given; allowed: vLLM's other options"):
            serve.server_command(target, draft, 2, True, [option, "x"])


def request(temperature=0.0, **extra):
    return SimpleNamespace(temperature=temperature, extra_args=extra)


def test_what_a_request_asks_for():
    assert lean.settings_of(request()) == {} == lean.settings_of(SimpleNamespace(temperature=1.0, extra_args=None))
    assert lean.settings_of(request(0.5, other=3)) == {}
    found = lean.settings_of(request(beagle_temperature=1, beagle_seed=3.0, beagle_top_p=0.9))
    assert found == {"temperature": 1.0, "seed": 3, "top_p": 0.9}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"beagle_seed": 1}, "beagle_seed given without beagle_temperature above 0"),
        ({"beagle_temperature": 0}, "beagle_temperature given without beagle_temperature above 0"),
        ({"beagle_temperature": "0.7"}, "beagle_temperature is '0.7'; allowed: a number"),
        ({"beagle_temperature": True}, "beagle_temperature is True; allowed: a number"),
        ({"beagle_temperature": 1, "beagle_seed": 1.5}, "beagle_seed is 1.5; allowed: an integer"),
        ({"beagle_temperature": 1, "beagle_topk": 4}, "beagle_topk is not known; allowed: beagle_seed, beagle_temp"),
        ({"beagle_temperature": 1, "beagle_top_p": 0}, "top_p is 0.0; allowed: above 0"),
        ({"beagle_temperature": 1, "beagle_seed": 2**63}, "seed is 9223372036854775808"),
        ({"beagle_temperature": float("nan")}, "is nan; allowed: a number"),
        ({"beagle_temperature": 1, "beagle_seed": float("inf")}, "beagle_seed is inf; allowed: an integer"),
        ({"beagle_temperature": 10**400}, "allowed: a number"),
        ({"beagle_temperature": 1, "beagle_top_k": 3_000_000_000}, "beagle_top_k is 3000000000; allowed: 0"),
        ({"temperature": 0.7, "beagle_temperature": 1}, "temperature is 0.7 beside beagle_temperature; allowed: 0"),
    ],
)
def test_requests_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        lean.settings_of(request(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_ride_along_exactly(dtype):
    positions = torch.tensor([0, 1, 255, 256, 8191, 65537, 2**24 - 1])
    states = torch.randn(7, 5).to(dtype)
    back, found = lean.positions_of(lean.with_positions(states, positions), 5)
    assert back.equal(states) and found.equal(positions)


def test_coupled_asks_for_a_draft_that_leans():
    def config(local, sharded=False):
        return SimpleNamespace(
            model_config=SimpleNamespace(logits_processors=[COUPLED]),
            speculative_config=SimpleNamespace(use_local_argmax_reduction=local),
            parallel_config=SimpleNamespace(enable_batch_sharded_sampling=sharded),
        )

    lean.check(config(True))
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling is True"):
        lean.check(config(True, sharded=True))
    with pytest.raises(ValueError, match="use_local_argmax_reduction is False"):
        lean.check(config(False))
