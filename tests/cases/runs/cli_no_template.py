"""A base model, whose tokenizer has no chat template: `beagle-sd generate TEXT --target FOLDER`, `prepare
chats.jsonl`.

Expected: one line that says --raw, or plain text (.txt), is the way.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import beagle_sd
from beagle_sd.models.smollm2 import converted

folder = pathlib.Path(tempfile.mkdtemp())
tokenizer = AutoTokenizer.from_pretrained(converted())
tokenizer.chat_template = None
target = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
)
target.save_pretrained(folder / "target")
tokenizer.save_pretrained(folder / "target")
beagle_sd.BeagleDraft.from_target(target.eval()).save_pretrained(folder / "draft")
(folder / "chats.jsonl").write_text(
    json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}) + "\n"
)
failed = False
for line, word in (
    (
        [
            "generate",
            "Hello",
            "--target",
            folder / "target",
            "--draft",
            folder / "draft",
            "--max-new-tokens",
            "4",
            "--tree",
            "2,2,3",
        ],
        "--raw",
    ),
    (["prepare", "chats.jsonl", "states", "--target", folder / "target", "--device", "cpu"], ".txt"),
):
    out = subprocess.run(
        [sys.executable, "-m", "beagle_sd", *map(str, line)], cwd=folder, capture_output=True, text=True
    )
    text = out.stdout + out.stderr
    print(line[0], out.returncode, "TRACEBACK" if "Traceback" in text else "", " ".join(text.split())[-330:])
    failed |= word not in text
sys.exit(failed)
