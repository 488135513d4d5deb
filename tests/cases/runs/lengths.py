"""A prompt of one token; a batch of very different lengths (1, 3, 700 tokens); the same call twice, and plain
generate before, between and after; max_new_tokens=1.

Expected: each row as alone, nothing left over in the model.
"""

import sys

import torch
from models import small_target

import beagle_sd

target = small_target(max_position_embeddings=64, initializer_range=0.3)
draft = beagle_sd.BeagleDraft.from_target(target)
rows = [torch.randint(3, 90, (n,)) for n in (1, 3, 700)]


def own(row, n=20):
    return target.generate(row[None], max_new_tokens=n, do_sample=False)[0, len(row) :]


want = [own(r) for r in rows]
failed = False
for side in ("left", "right"):
    T = max(map(len, rows))
    ids = torch.zeros(len(rows), T, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, r in enumerate(rows):
        at = slice(T - len(r), T) if side == "left" else slice(0, len(r))
        ids[b, at] = r
        mask[b, at] = 1
    for again in range(2):
        made = beagle_sd.generate(target, draft, ids, mask, max_new_tokens=20).sequences[:, T:]
        ok = all(torch.equal(m, w) for m, w in zip(made, want))
        print(side, again, ok)
        failed |= not ok
for r, w in zip(rows, want):
    ok = (
        torch.equal(beagle_sd.generate(target, draft, r[None], max_new_tokens=20).sequences[0, len(r) :], w)
        and torch.equal(beagle_sd.generate(target, draft, r[None], max_new_tokens=1).sequences[0, len(r) :], w[:1])
        and torch.equal(own(r), w)
    )
    print(len(r), ok)
    failed |= not ok
names = [n for n, m in target.named_modules() if "forward" in m.__dict__]
print("left over:", names, target.config._attn_implementation)
failed |= bool(names) or target.config._attn_implementation == "beagle_tree"
sys.exit(failed)
