"""Ctrl-C, or a client that goes away, inside a streamer or a criterion.

Expected: the model is as before, the next answer right.
"""

import sys

import torch
from models import small_target

import beagle_sd

target = small_target(initializer_range=0.3)
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(3, 90, (1, 12))
want = target.generate(ids, max_new_tokens=24, do_sample=False)


class S:
    def __init__(self, error):
        self.n, self.error = 0, error

    def put(self, v):
        self.n += 1
        if self.n == 4:
            raise self.error

    def end(self):
        pass


engine = beagle_sd.Engine(target, draft, batch=1, capacity=40)
failed = False
for error in (KeyboardInterrupt(), BrokenPipeError("gone")):
    for more in ({}, {"engine": engine}):
        try:
            beagle_sd.generate(target, draft, ids, max_new_tokens=24, streamer=S(error), **more)
            failed = True
        except type(error):
            pass
        ok = (
            torch.equal(beagle_sd.generate(target, draft, ids, max_new_tokens=24, **more).sequences, want)
            and torch.equal(target.generate(ids, max_new_tokens=24, do_sample=False), want)
            and target.config._attn_implementation != "beagle_tree"
        )
        print(type(error).__name__, bool(more), ok)
        failed |= not ok
sys.exit(failed)
