"""Targets whose attention has learned sinks (s_aux: gpt-oss made or fine-tuned with full attention in every layer,
Flint's small models).

Expected: the tokens of the target's own generate, or refused by name.
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
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    layer_types=["full_attention"] * 2,
)
failed = False
for kind, more in (
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("flint", {"shared_expert_intermediate_size": 32}),
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **S, **more)).eval()
    ids = torch.randint(3, 90, (1, 9))
    want = model.generate(ids, max_new_tokens=16, do_sample=False)
    for name, make in (("plain", lambda: None), ("draft", lambda: beagle_sd.BeagleDraft.from_target(model))):
        try:
            made = beagle_sd.generate(model, make(), ids, max_new_tokens=16).sequences
            same = torch.equal(made, want)
            failed |= not same
            print(kind, name, "same" if same else f"OTHER TOKENS from {int((made[0] != want[0]).nonzero()[0]) - 9}")
        except ValueError as error:
            print(kind, name, "refused:", error)
sys.exit(failed)
