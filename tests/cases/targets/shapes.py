"""Head sizes, group sizes and widths that are no round numbers (Qwen2.5-0.5B has 14 heads over 2, others 80, 96, 112
wide heads, odd vocabularies).

Expected: the target's own tokens for a few dozen random shapes, fp32; bf16 runs.
"""

import random
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import beagle_sd

torch.set_num_threads(1)

random.seed(0)
failed = False
for trial in range(40):
    kv = random.choice([1, 2, 3])
    heads = kv * random.choice([1, 2, 3, 7])
    head = random.choice([6, 8, 10, 20, 24, 48, 80, 96, 112, 256])
    width = heads * random.choice([head, 6, 10, 22, 37])
    torch.manual_seed(trial)
    t = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=random.choice([97, 101, 256, 1003]),
            hidden_size=width,
            intermediate_size=random.choice([33, 96, 129]),
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=head,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    ids = torch.randint(3, 90, (random.choice([1, 2]), random.choice([1, 5, 13])))
    tree = beagle_sd.TreeShape(
        depth=random.choice([1, 3, 5]), branch=random.choice([1, 2, 5]), num_nodes=random.choice([4, 9, 30])
    )
    try:
        d = beagle_sd.BeagleDraft.from_target(t, torch.arange(0, 97, 3) if trial % 3 == 0 else None)
        want = t.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        made = beagle_sd.generate(t, d, ids, max_new_tokens=20, tree=tree).sequences
        if not torch.equal(made, want):
            print(trial, "OTHER", t.config.head_dim, heads, kv, width, tree)
            failed = True
    except Exception as error:
        print(trial, heads, kv, head, width, tree, type(error).__name__, str(error)[:140])
        failed |= "allowed" not in str(error)
print("40 shapes")
sys.exit(failed)
