"""transformers' pipeline("text-generation"), with a chat and a system turn, given custom_generate.

Expected: the text of the pipeline without it.
"""

import sys

from transformers import pipeline

import beagle_sd

target, tokenizer, draft = beagle_sd.load_bundled()
pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
chat = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}]
want = pipe(chat, max_new_tokens=32, do_sample=False)[0]["generated_text"][-1]["content"]
try:
    made = pipe(chat, max_new_tokens=32, do_sample=False, custom_generate=beagle_sd.custom_generate(draft))[0][
        "generated_text"
    ][-1]["content"]
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(1)
print(repr(want))
print(repr(made))
batch = pipe(
    [chat, chat[1:]], max_new_tokens=16, do_sample=False, batch_size=2, custom_generate=beagle_sd.custom_generate(draft)
)
sys.exit(made != want)
