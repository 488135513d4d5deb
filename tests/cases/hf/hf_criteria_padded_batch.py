"""A stopping criterion as users write it: it looks at input_ids[:, prompt_length:], where prompt_length is the padded
width that plain generate has.

Expected: a padded batch stops where plain generate stops.
"""

import sys

import torch
from models import small_target
from transformers import StoppingCriteria, StoppingCriteriaList

import beagle_sd

target = small_target()
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(1, 97, (2, 12))
mask = torch.ones_like(ids)
mask[1, :8] = 0
ids[1, :8] = 0


class After(StoppingCriteria):
    """Stop a row once `count` tokens of its answer are there."""

    def __init__(self, width, count):
        self.width, self.count = width, count

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([len(row[self.width :]) >= self.count for row in input_ids])


settings = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)


def run(**more):
    return target.generate(ids, **settings, stopping_criteria=StoppingCriteriaList([After(ids.shape[1], 5)]), **more)


want, made = run(), run(custom_generate=beagle_sd.custom_generate(draft))
print("plain new tokens:", want.shape[1] - 12, "ours:", made.shape[1] - 12)
sys.exit(made.shape != want.shape or not torch.equal(made, want))
