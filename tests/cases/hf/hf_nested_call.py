"""A criterion or streamer that asks the same target (a perplexity guard, an embedding of the text so far, a second
short generate).

Expected: it works as with plain generate.
"""

import sys

import torch
from models import small_target

import beagle_sd

target = small_target()
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(1, 97, (1, 12))
alone = target(ids).logits


def guard(input_ids, scores, **kwargs):
    logits = target(input_ids[:, :12]).logits
    return not torch.allclose(logits, alone, atol=1e-4)  # stop if the model computes something else


failed = False
for name, by in (("plain", None), ("ours", beagle_sd.custom_generate(draft))):
    try:
        more = {"custom_generate": by} if by else {}
        out = target.generate(ids, max_new_tokens=10, do_sample=False, stopping_criteria=[guard], **more)
        print(name, out.shape[1] - 12, "new tokens")
        failed |= out.shape[1] - 12 != 10
    except Exception as error:
        print(name, type(error).__name__, error)
        failed = True
sys.exit(failed)
