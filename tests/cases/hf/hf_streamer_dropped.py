"""target.generate(..., streamer=s, custom_generate=f), as every chat example of transformers does it.

Expected: the streamer is given the tokens and its end, or the call is refused with the way to do it.
"""

import sys

import torch
from models import small_target

import beagle_sd

target = small_target(initializer_range=0.02)
draft = beagle_sd.BeagleDraft.from_target(target)


class S:
    def __init__(self):
        self.got, self.ended = 0, False

    def put(self, value):
        self.got += value.numel()

    def end(self):
        self.ended = True


streamer = S()
try:
    target.generate(
        torch.ones(1, 4, dtype=torch.int64),
        max_new_tokens=8,
        do_sample=False,
        streamer=streamer,
        custom_generate=beagle_sd.custom_generate(draft),
    )
except Exception as error:
    print("refused:", type(error).__name__, error)
    sys.exit(0)
print("tokens streamed:", streamer.got, "end told:", streamer.ended)
sys.exit(not streamer.ended)
