"""A compiled target in the ways people do it: torch.compile(model), model.compile(), model.forward =
torch.compile(model.forward), model.model = torch.compile(model.model).

Expected: the same tokens, in a bounded time (no recompilation every round).
"""

import sys
import time
import warnings

import torch
import torch._dynamo
from models import small_target

import beagle_sd

warnings.filterwarnings("ignore")


def tiny():
    return small_target()


ids = torch.randint(1, 97, (1, 12))
want = tiny().generate(ids, max_new_tokens=24, do_sample=False)


def whole(m):
    return torch.compile(m, backend="eager")


def in_place(m):
    m.compile(backend="eager")
    return m


def forward(m):
    m.forward = torch.compile(m.forward, backend="eager")
    return m


def decoder(m):
    m.model = torch.compile(m.model, backend="eager")
    return m


failed = False
for f in (whole, in_place, forward, decoder):
    torch._dynamo.reset()
    model = f(tiny())
    for name in ("draft", "custom_generate"):
        began = time.time()
        try:
            draft = beagle_sd.BeagleDraft.from_target(model)
            made = (
                model.generate(
                    ids, max_new_tokens=24, do_sample=False, custom_generate=beagle_sd.custom_generate(draft)
                )
                if name == "custom_generate"
                else beagle_sd.generate(model, draft, ids, max_new_tokens=24).sequences
            )
            same = torch.equal(made, want)
            print(f.__name__, name, "same" if same else "OTHER TOKENS", f"{time.time() - began:.1f} s")
            failed |= not same
        except Exception as error:
            print(
                f.__name__,
                name,
                type(error).__name__,
                str(error)[:200].replace("\n", " "),
                f"{time.time() - began:.1f} s",
            )
            failed |= not (isinstance(error, ValueError) and "allowed" in str(error))
sys.exit(failed)
