"""max_new_tokens 'until it ends' (32,768, as model cards of reasoning models say), an answer of some tokens.

Expected: about the time and memory of a small limit. Prints seconds of CPU and peak GB of each limit.
"""

import resource
import subprocess
import sys
import time

import torch

import beagle_sd

if len(sys.argv) < 2:
    rows = {}
    for limit in ("64", "32768", "1000000"):
        out = subprocess.run([sys.executable, __file__, limit], capture_output=True, text=True)
        rows[limit] = (out.stdout.strip().splitlines() or [out.stderr.strip().splitlines()[-1][:200]])[-1]
        print(limit, rows[limit], flush=True)
    try:
        small, large = ([float(x) for x in rows[k].split()[:2]] for k in ("64", "32768"))
    except ValueError:
        sys.exit(1)
    sys.exit(large[0] > 1.5 * small[0] + 1 or large[1] > small[1] + 0.3 or "rror" in rows["1000000"])
torch.set_num_threads(1)
target, tokenizer, draft = beagle_sd.load_bundled()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
began = time.process_time()
out = beagle_sd.generate(target, draft, **prompt, max_new_tokens=int(sys.argv[1]))
peak, took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, time.process_time() - began
engine = beagle_sd.Engine(target, draft, batch=1, capacity=prompt["input_ids"].shape[1] + int(sys.argv[1]))
print(f"{took:.1f} {peak:.2f} new tokens {out.report.new_tokens}, buffers {engine.nbytes / 1e9:.2f} GB")
