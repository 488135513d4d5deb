"""A server: one thread answers with beagle_sd.generate while another scores texts with the same model (a plain
forward, or plain target.generate).

Expected: the plain calls give what they give alone.
"""

import sys
import threading

import torch
from models import small_target

import beagle_sd

torch.set_num_threads(1)

target = small_target()
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(1, 97, (1, 12))
with torch.no_grad():
    alone = target(ids).logits
want = target.generate(ids, max_new_tokens=12, do_sample=False)
done, faults = threading.Event(), {}


def speculate():
    for _ in range(8):
        beagle_sd.generate(target, draft, ids, max_new_tokens=100)
    done.set()


def note(kind):
    faults[kind] = faults.get(kind, 0) + 1


worker = threading.Thread(target=speculate)
worker.start()
calls = 0
while not done.is_set():
    calls += 1
    try:
        with torch.no_grad():
            if not torch.allclose(target(ids).logits, alone, atol=1e-4):
                note("forward: other logits")
    except Exception as error:
        note(f"forward: {type(error).__name__}: {error}")
    try:
        if not torch.equal(target.generate(ids, max_new_tokens=12, do_sample=False), want):
            note("generate: other tokens")
    except Exception as error:
        note(f"generate: {type(error).__name__}: {error}")
worker.join()
print(calls, "rounds of plain calls;", faults)
sys.exit(bool(faults))
