"""A LoRA-tuned target, as PEFT wraps it: beagle_sd.generate(peft_model, draft), BeagleDraft.from_target(peft_model),
peft_model.generate(custom_generate=...).

Expected: works with the adapter's effect, or refused with the way (merge_and_unload, or model.get_base_model()).
"""

import sys

import torch
from models import small_target
from peft import LoraConfig, get_peft_model

import beagle_sd

base = small_target()
heads = sys.argv[1:] or ["q_proj", "v_proj"]
model = get_peft_model(
    base, LoraConfig(r=4, target_modules=heads, init_lora_weights=False, task_type="CAUSAL_LM")
).eval()
ids = torch.randint(1, 97, (1, 12))
want = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
with model.disable_adapter():
    assert not torch.equal(model.generate(input_ids=ids, max_new_tokens=20, do_sample=False), want)
failed = False


def attempt(name, call):
    global failed
    try:
        same = torch.equal(call(), want)
        print(name, "same" if same else "OTHER TOKENS")
        failed |= not same
    except Exception as error:
        print(name, type(error).__name__, str(error)[:200])
        failed |= not (isinstance(error, ValueError) and "allowed" in str(error))


attempt("generate(peft, None)", lambda: beagle_sd.generate(model, None, ids, max_new_tokens=20).sequences)
attempt(
    "from_target(peft)",
    lambda: beagle_sd.generate(model, beagle_sd.BeagleDraft.from_target(model), ids, max_new_tokens=20).sequences,
)
inner = model.get_base_model()
attempt(
    "generate(inner)",
    lambda: beagle_sd.generate(inner, beagle_sd.BeagleDraft.from_target(inner), ids, max_new_tokens=20).sequences,
)
draft = beagle_sd.BeagleDraft.from_target(inner)
attempt(
    "peft.generate(custom_generate)",
    lambda: model.generate(
        input_ids=ids, max_new_tokens=20, do_sample=False, custom_generate=beagle_sd.custom_generate(draft)
    ),
)
after = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
print("plain again:", torch.equal(after, want))
failed |= not torch.equal(after, want)
sys.exit(failed)
