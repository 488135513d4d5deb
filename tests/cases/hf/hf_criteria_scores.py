"""A criterion that reads scores (confidence, entropy: transformers gives it the step's scores only with
output_scores, else None) and one that returns a plain bool, as older code does.

Expected: bool works; scores None as in plain generate.
"""

import sys

import torch
from models import small_target

import beagle_sd

target = small_target()
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(1, 97, (1, 12))
seen = []


def stop(input_ids, scores, **kwargs):
    seen.append(None if scores is None else tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__)
    return input_ids.shape[1] >= 17


out = []
for by in (None, beagle_sd.custom_generate(draft)):
    seen.clear()
    out.append(
        target.generate(ids, max_new_tokens=20, do_sample=False, stopping_criteria=[stop], custom_generate=by)
        if by
        else target.generate(ids, max_new_tokens=20, do_sample=False, stopping_criteria=[stop])
    )
    print("scores seen:", set(seen), "new tokens:", out[-1].shape[1] - 12)
sys.exit(not torch.equal(*out))
