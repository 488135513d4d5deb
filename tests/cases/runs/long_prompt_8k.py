"""A prompt of 8,000 tokens (SmolLM2's context is 8,192): CPU seconds and peak memory beside the target's own
generate.

Expected: no more than about 1.3 times either, the same tokens. Takes minutes. Argument: tokens (8000).
"""

import resource
import subprocess
import sys
import time

import torch

import beagle_sd

if len(sys.argv) < 3:
    n = sys.argv[1] if len(sys.argv) > 1 else "8000"
    rows = {}
    for who in ("own", "plain", "draft"):
        out = subprocess.run([sys.executable, __file__, n, who], capture_output=True, text=True)
        line = (out.stdout.strip().splitlines() or ["none"])[-1]
        print(who, line if out.returncode == 0 else out.stderr[-300:], flush=True)
        rows[who] = line.split(" | ")
    failed = (
        rows["own"][2] != rows["draft"][2]
        or float(rows["draft"][0]) > 1.3 * float(rows["own"][0])
        or float(rows["draft"][1]) > 1.3 * float(rows["own"][1])
    )
    sys.exit(failed)
torch.set_num_threads(1)
target, tokenizer, draft = beagle_sd.load_bundled()
torch.manual_seed(0)
text = "The river runs past the old mill and the boy counts the boats. " * 1000
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : int(sys.argv[1])]
began = time.process_time()
if sys.argv[2] == "own":
    out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
else:
    out = beagle_sd.generate(target, draft if sys.argv[2] == "draft" else None, ids, max_new_tokens=8).sequences
took, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{took:.1f} | {peak:.2f} | {out[0, -8:].tolist()}")
