"""TextStreamer, TextIteratorStreamer and the CLI's own streamer on text with emoji and CJK, several tokens a round.

Expected: what is printed is the decoded text, with no replacement character.
"""

import contextlib
import io
import sys
import threading

from rich.console import Console
from transformers import TextIteratorStreamer, TextStreamer

import beagle_sd
from beagle_sd.cli.generate import RunStreamer

target, tokenizer, draft = beagle_sd.load_bundled()
chat = [
    {
        "role": "user",
        "content": "Repeat exactly: \U0001f389\U0001f642 \u4f60\u597d\u4e16\u754c caf\u00e9 \U0001f1eb\U0001f1f7",
    }
]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
T = prompt["input_ids"].shape[1]
failed = False
for new in (40, 3, 5, 6, 7):
    want = tokenizer.decode(
        beagle_sd.generate(target, None, prompt["input_ids"], max_new_tokens=new).sequences[0, T:],
        skip_special_tokens=True,
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        beagle_sd.generate(
            target,
            draft,
            prompt["input_ids"],
            max_new_tokens=new,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    it = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    worker = threading.Thread(
        target=lambda: beagle_sd.generate(target, draft, prompt["input_ids"], max_new_tokens=new, streamer=it)
    )
    worker.start()
    chunks = list(it)
    worker.join()
    own = io.StringIO()
    beagle_sd.generate(
        target,
        draft,
        prompt["input_ids"],
        max_new_tokens=new,
        streamer=RunStreamer(Console(file=own, width=10000), tokenizer),
    )
    row = {
        "TextStreamer": out.getvalue().rstrip("\n"),
        "TextIteratorStreamer": "".join(chunks),
        "RunStreamer": own.getvalue().rstrip("\n"),
    }
    print(new, repr(want), {k: v == want.rstrip("\n") for k, v in row.items()}, "own:", repr(row["RunStreamer"])[:90])
    failed |= row["TextStreamer"] != want.rstrip("\n") or row["TextIteratorStreamer"] != want
    failed |= row["RunStreamer"] != want.rstrip("\n").rstrip("\ufffd") and row["RunStreamer"] != want.rstrip("\n")
sys.exit(failed)
