"""`beagle-sd prepare prompts.jsonl states --regenerate --context 2048` where prompts have a system turn and a
document of 300 to 900 tokens (RAG, agents).

Expected: answered, up to the context.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from beagle_sd.models.smollm2 import converted

folder = pathlib.Path(tempfile.mkdtemp())
tokenizer = AutoTokenizer.from_pretrained(converted())
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
).save_pretrained(folder / "target")
tokenizer.save_pretrained(folder / "target")
with open(folder / "prompts.jsonl", "w") as file:
    for n in (20, 300, 900):
        file.write(
            json.dumps(
                {"messages": [{"role": "system", "content": "Use the text."}, {"role": "user", "content": "word " * n}]}
            )
            + "\n"
        )
out = subprocess.run(
    [
        sys.executable,
        "-m",
        "beagle_sd",
        "prepare",
        "prompts.jsonl",
        "states",
        "--target",
        str(folder / "target"),
        "--regenerate",
        "--context",
        "2048",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ],
    cwd=folder,
    capture_output=True,
    text=True,
)
text = " ".join((out.stdout + out.stderr).split())
print(out.returncode, text[-260:])
sys.exit("3 of 3" not in text)
