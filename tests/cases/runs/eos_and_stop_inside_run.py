"""The end token, one of several end tokens, or a stop string in the middle of a run of accepted tokens.

Expected: text, stream and report end there, as plain generate's text does.
"""

import sys

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

import beagle_sd

target, tokenizer, draft = beagle_sd.load_bundled()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
T = prompt["input_ids"].shape[1]
free = target.generate(**prompt, max_new_tokens=40, do_sample=False)[0, T:]


class S:
    def __init__(self):
        self.ids = []

    def put(self, v):
        self.ids += v.flatten().tolist()

    def end(self):
        self.ids.append(-1)


failed, inside = False, 0
for at in range(3, 30, 3):
    end = int(free[at])
    want = target.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=[end, 0], pad_token_id=0)
    s = S()
    made = beagle_sd.generate(
        target,
        draft,
        **prompt,
        max_new_tokens=40,
        eos_token_id=[end, 0],
        streamer=s,
        tree=beagle_sd.TreeShape(4, 4, 16),
    )
    ok = torch.equal(made.sequences, want) and s.ids == made.sequences[0].tolist() + [-1]
    failed |= not ok
    inside += made.report.tokens_per_round > 1
text = tokenizer.decode(free, skip_special_tokens=True)
print(repr(text))
for stop in (text[6:9], text[20:22], text[31:36], text[45:47]):
    want = target.generate(**prompt, max_new_tokens=40, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    s = S()
    made = target.generate(
        **prompt,
        max_new_tokens=40,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])]),
        custom_generate=beagle_sd.custom_generate(draft, streamer=s, tree=beagle_sd.TreeShape(4, 4, 16)),
    )
    ok = torch.equal(made, want) and s.ids == made[0].tolist() + [-1]
    print(repr(stop), made.shape[1] - T, ok)
    failed |= not ok
print("runs with more than a token a round:", inside)
sys.exit(failed)
