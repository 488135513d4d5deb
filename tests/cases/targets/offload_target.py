"""A target with device_map / accelerate offload: weights of some layers, or the head, are on the CPU's memory or disk
and 'meta' between calls.

Expected: works as target.generate does, or refused with the reason.
"""

import sys
import tempfile

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import small_target
from transformers import LlamaForCausalLM

import beagle_sd


def tiny(**more):
    return small_target(**more)


ids = torch.randint(1, 97, (1, 12))
want = tiny().generate(ids, max_new_tokens=20, do_sample=False)


def all_cpu(m):
    return cpu_offload(m, torch.device("cpu"))


def all_disk(m):
    return disk_offload(m, tempfile.mkdtemp(), torch.device("cpu"))


def some_disk(m):
    return dispatch_model(
        m,
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        main_device="cpu",
        offload_dir=tempfile.mkdtemp(),
    )


def head_disk(m):
    return dispatch_model(m, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=tempfile.mkdtemp())


def from_map(m):
    folder = tempfile.mkdtemp()
    m.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(
        folder, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tempfile.mkdtemp()
    ).eval()


def auto(m):
    folder = tempfile.mkdtemp()
    m.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, device_map="auto", dtype="auto").eval()


failed = False
for f in (auto, some_disk, all_cpu, all_disk, head_disk, from_map):
    try:
        model = f(tiny())
        own = model.generate(ids, max_new_tokens=20, do_sample=False)
    except Exception as error:
        print(f.__name__, "plain generate does not work either:", type(error).__name__, str(error)[:100])
        continue
    for name, make in (
        ("plain", lambda: None),
        ("draft", lambda: beagle_sd.BeagleDraft.from_target(model)),
        ("custom_generate", lambda: beagle_sd.BeagleDraft.from_target(model)),
    ):
        try:
            made = (
                model.generate(
                    ids, max_new_tokens=20, do_sample=False, custom_generate=beagle_sd.custom_generate(make())
                )
                if name == "custom_generate"
                else beagle_sd.generate(model, make(), ids, max_new_tokens=20).sequences
            )
            same = torch.equal(made, want)
            print(f.__name__, name, "same" if same else "OTHER TOKENS")
            failed |= not same
        except Exception as error:
            print(f.__name__, name, type(error).__name__, str(error)[:150].replace("\n", " "))
            failed |= not (isinstance(error, ValueError) and "allowed" in str(error))
sys.exit(failed)
