"""A draft saved in shards, in bf16, as .bin of older transformers, with a newer transformers_version in its config,
with fields it does not know; loaded from another folder, in another dtype.

Expected: loads and drafts the same text.
"""

import copy
import json
import os
import pathlib
import sys
import tempfile

import torch
from models import small_target

import beagle_sd
from beagle_sd.models.loading import load_draft

target = small_target(initializer_range=0.3)
draft = beagle_sd.BeagleDraft.from_target(target, torch.arange(0, 97, 2))
ids = torch.randint(3, 90, (1, 12))
want = target.generate(ids, max_new_tokens=24, do_sample=False)
failed = False


def attempt(name, folder, load=load_draft):
    global failed
    try:
        d = load(folder, target)
        same = torch.equal(beagle_sd.generate(target, d, ids, max_new_tokens=24).sequences, want)
        print(f"{name:28s}", "same" if same else "OTHER", d.dtype)
        failed |= not same
    except Exception as error:
        print(f"{name:28s} {type(error).__name__}: {str(error)[:170]}")
        failed |= not (isinstance(error, (ValueError, OSError)) and "allowed" in str(error))


def new():
    return pathlib.Path(tempfile.mkdtemp())


f = new()
draft.save_pretrained(f, max_shard_size="20KB")
print(sorted(p.name for p in f.iterdir())[:4])
attempt("shards", f)
f = new()
d = copy.deepcopy(draft).to(torch.bfloat16)
d.save_pretrained(f)
attempt("bf16", f)
attempt("bf16, from_pretrained+bind", f, lambda x, t: beagle_sd.BeagleDraft.from_pretrained(x).bind(t))
attempt("bf16, dtype=float32", f, lambda x, t: beagle_sd.BeagleDraft.from_pretrained(x, dtype=torch.float32).bind(t))
f = new()
draft.save_pretrained(f)
(f / "model.safetensors").unlink()
torch.save(draft.state_dict(), f / "pytorch_model.bin")
attempt(".bin", f)
f = new()
draft.save_pretrained(f)
c = json.loads((f / "config.json").read_text())
c.update(transformers_version="9.0.0", a_new_field={"x": 1})
(f / "config.json").write_text(json.dumps(c))
attempt("newer config", f)
f = new()
draft.save_pretrained(f)
c = json.loads((f / "config.json").read_text())
p = c.pop("rope_parameters", None)
c.update(rope_theta=p["rope_theta"])
(f / "config.json").write_text(json.dumps(c))
attempt("config of transformers 4", f)
f = new()
draft.save_pretrained(f)
os.chdir(f.parent)
attempt("relative path", pathlib.Path(f.name))
attempt("str path", str(f) + "/")
f = new()
target.save_pretrained(f)
attempt("a target's folder", f)
sys.exit(failed)
