"""The bundled target and draft as the README has them.

Expected: the tokens of target.generate, by both ways.
"""

import sys

import torch
import transformers

import beagle_sd

t, k, d = beagle_sd.load_bundled()
p = k.apply_chat_template(
    [{"role": "user", "content": "Name a river."}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
a = beagle_sd.generate(t, d, **p, max_new_tokens=16)
b = t.generate(**p, max_new_tokens=16, do_sample=False)
c = t.generate(**p, max_new_tokens=16, do_sample=False, custom_generate=beagle_sd.custom_generate(d))
print(
    sys.version.split()[0],
    torch.__version__,
    transformers.__version__,
    torch.equal(a.sequences, b),
    torch.equal(c, b),
    a.report.tokens_per_round,
)
sys.exit(not (torch.equal(a.sequences, b) and torch.equal(c, b)))
