"""bf16 and fp16 on a CPU, torch's default dtype changed by the user's program, autocast around the call,
inference_mode, the target cast after the draft was bound, a draft in another dtype than the target.

Expected: works; tokens as plain decoding (fp32), no crash elsewhere.
"""

import copy
import pickle
import sys

import torch
from models import small_target

import beagle_sd


def tiny():
    return small_target(initializer_range=0.3)


ids = torch.randint(3, 90, (2, 12))
failed = False


def attempt(name, call, exact=True):
    global failed
    try:
        made, want = call()
        same = torch.equal(made, want)
        print(f"{name:40s}", "same" if same else "other tokens")
        failed |= exact and not same
    except Exception as error:
        print(f"{name:40s} {type(error).__name__}: {str(error)[:160]}")
        failed |= "allowed" not in str(error) or name.startswith("default dtype")


def run(target, draft, **k):
    return beagle_sd.generate(target, draft, ids, max_new_tokens=24, **k).sequences, target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )


for dtype in (torch.bfloat16, torch.float16):
    t = tiny().to(dtype)
    attempt(f"{dtype} plain", lambda: run(t, None), False)
    attempt(f"{dtype} draft", lambda: run(t, beagle_sd.BeagleDraft.from_target(t)), False)
    t2 = tiny()
    d = beagle_sd.BeagleDraft.from_target(t2)
    t2.to(dtype)
    attempt(f"cast to {dtype} after bind", lambda: run(t2, d), False)
    t3 = tiny()
    d3 = beagle_sd.BeagleDraft.from_target(t3).to(dtype)
    attempt(f"fp32 target, {dtype} draft", lambda: run(t3, d3))
    t4 = tiny()
    d4 = beagle_sd.BeagleDraft.from_target(t4, torch.arange(0, 97, 2))
    t4.to(dtype)
    attempt(f"cast to {dtype} after bind, reduced", lambda: run(t4, d4), False)
t = tiny()
d = beagle_sd.BeagleDraft.from_target(t)
for dtype in (torch.bfloat16, torch.float64):
    torch.set_default_dtype(dtype)
    attempt(f"default dtype {dtype}", lambda: run(t, d))
    torch.set_default_dtype(torch.float32)


def auto():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(t, d)


attempt("autocast bf16", auto, False)


def inf():
    with torch.inference_mode():
        return run(t, d)


attempt("inference_mode", inf)
attempt("logprobs under default", lambda: run(t, d, return_logprobs=True))
attempt("deepcopy of the pair", lambda: (lambda tt: run(tt, beagle_sd.BeagleDraft.from_target(tt)))(copy.deepcopy(t)))


def deep():
    dd = copy.deepcopy(d)
    return run(t, dd)


attempt("deepcopy of the draft", deep)


def pick():
    dd = pickle.loads(pickle.dumps(d))
    return run(t, dd)


attempt("pickle of the draft", pick)
t64 = tiny().double()
attempt("float64", lambda: run(t64, beagle_sd.BeagleDraft.from_target(t64).double()))
torch.use_deterministic_algorithms(True)
attempt("deterministic algorithms", lambda: run(t, d))
torch.use_deterministic_algorithms(False)
sys.exit(failed)
