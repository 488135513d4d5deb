"""Targets with scaled or partial rotary positions: linear, yarn, llama3, partial rotary, long context; also the
legacy rope_scaling field.

Expected: same tokens as the target's own generate, also past max_position_embeddings; longrope and dynamic refused by
name.
"""

import sys
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

import beagle_sd

warnings.filterwarnings("ignore")
logging.set_verbosity_error()

S = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
kinds = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn mscale": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.3,
            }
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 5e5,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "legacy rope_scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}),
    "partial": ("glm", {"partial_rotary_factor": 0.5}),
    "partial yarn": (
        "glm4",
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "past max_position_embeddings": ("llama", {"max_position_embeddings": 16}),
    "bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "ntk": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
}
failed = False
for name, (kind, more) in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**S, **more})).eval()
    ids = torch.randint(3, 90, (1, 40))
    want = model.generate(ids, max_new_tokens=60, do_sample=False)
    out = []
    for make in (lambda: None, lambda: beagle_sd.BeagleDraft.from_target(model)):
        try:
            same = torch.equal(beagle_sd.generate(model, make(), ids, max_new_tokens=60).sequences, want)
            failed |= not same
            out.append("same" if same else "OTHER")
        except ValueError as error:
            out.append("refused: " + str(error)[:110])
        except Exception as error:
            out.append(type(error).__name__ + " " + str(error)[:100])
            failed = True
    print(f"{name:30s}", "; ".join(out))
sys.exit(failed)
