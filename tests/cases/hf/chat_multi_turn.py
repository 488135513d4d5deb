"""A chat of several turns with a system prompt.

Expected: right text each turn (no state left over), and a way to keep the keys of earlier turns, so that a turn's
prefill is that of its new tokens.
"""

import sys

import torch

import beagle_sd

torch.set_num_threads(1)

target, tokenizer, draft = beagle_sd.load_bundled()
chat = [{"role": "system", "content": "You are a helpful guide. " + "Facts about rivers: the Nile is long. " * 60}]
beagle_sd.generate(target, draft, torch.ones(1, 64, dtype=torch.int64), max_new_tokens=4)  # warm
wrong, prefills = False, []
for question in ("Name a river.", "And another one?", "Which is longer?", "Thanks!"):
    chat.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    T = prompt["input_ids"].shape[1]
    made = beagle_sd.generate(target, draft, **prompt, max_new_tokens=24)
    wrong |= not torch.equal(made.sequences, beagle_sd.generate(target, None, **prompt, max_new_tokens=24).sequences)
    prefills.append((T, round(made.report.seconds.get("prefill", 0), 2), round(sum(made.report.seconds.values()), 2)))
    chat.append({"role": "assistant", "content": tokenizer.decode(made.sequences[0, T:], skip_special_tokens=True)})
print("prompt tokens, seconds of prefill, of all:", prefills, "wrong text:", wrong)
earlier = target(prompt["input_ids"][:, :8], use_cache=True)
kept = getattr(earlier, "cache", None) or earlier.past_key_values
try:
    target.generate(**prompt, max_new_tokens=4, past_key_values=kept, custom_generate=beagle_sd.custom_generate(draft))
    print("keys of an earlier turn: taken")
except ValueError as error:
    print("keys of an earlier turn: refused" if "allowed" in str(error) else "keys of an earlier turn:", error)
reused = prefills[-1][1] < 0.5 * prefills[0][1]
sys.exit(wrong or not reused)
