"""target.generate(stop_strings=["x"], tokenizer=tok, custom_generate=f), as plain generate takes it.

Expected: stops, or an error that says what to do here (StopStringCriteria).
"""

import sys

import torch

import beagle_sd

target, tokenizer, draft = beagle_sd.load_bundled()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Count from one to ten."}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
settings = dict(max_new_tokens=24, do_sample=False, stop_strings=["four", "4"], tokenizer=tokenizer)
want = target.generate(**prompt, **settings)
print("plain:", repr(tokenizer.decode(want[0, prompt["input_ids"].shape[1] :])))
try:
    made = target.generate(**prompt, **settings, custom_generate=beagle_sd.custom_generate(draft))
    print("ours:", repr(tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])))
    sys.exit(not torch.equal(made, want))
except Exception as error:
    print(type(error).__name__, str(error)[:400])
    sys.exit("StopStringCriteria" not in str(error))
