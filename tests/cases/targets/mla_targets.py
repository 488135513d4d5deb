"""Targets with multi-head latent attention (DeepSeek V2/V3, GLM-4.7-Flash, MiniCPM3, Youtu, LongCat): keys are wider
than values, config.head_dim is the rotary part.

Expected: they decode, or are refused with that reason before anything runs.
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
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
failed = False
for kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "longcat_flash", "sarvam_mla"):
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **S)).eval()
        ids = torch.randint(3, 90, (1, 9))
        want = model.generate(ids, max_new_tokens=12, do_sample=False)
    except Exception as error:
        print(kind, "own generate:", type(error).__name__, str(error)[:90])
        continue
    for make in (lambda: None, lambda: beagle_sd.BeagleDraft.from_target(model)):
        try:
            same = torch.equal(beagle_sd.generate(model, make(), ids, max_new_tokens=12).sequences, want)
            print(kind, "same" if same else "OTHER")
            failed |= not same
        except Exception as error:
            clear = isinstance(error, beagle_sd.UnsupportedTarget)
            print(
                kind, "head_dim", getattr(model.config, "head_dim", None), "->", type(error).__name__, str(error)[:140]
            )
            failed |= not clear
sys.exit(failed)
