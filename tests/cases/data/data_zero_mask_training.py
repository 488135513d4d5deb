"""Training on a set with rows of which nothing is learnt (answers cut away by the context): a step may hold nothing
but such rows.

Expected: finite losses, the run goes on.
"""

import json
import pathlib
import random
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
random.seed(0)
with open(folder / "chats.jsonl", "w") as file:
    for i in range(24):
        file.write(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "word " * (400 if i % 4 else 5)},
                        {"role": "assistant", "content": "yes it is so"},
                    ]
                }
            )
            + "\n"
        )


def run(*args):
    out = subprocess.run(
        [sys.executable, "-m", "beagle_sd", *map(str, args)], cwd=folder, capture_output=True, text=True
    )
    print(args[0], out.returncode, (out.stdout + out.stderr).strip().splitlines()[-1][:200], flush=True)
    return out.returncode


rc = run("prepare", "chats.jsonl", "states", "--target", folder / "target", "--context", "128", "--device", "cpu")
rc |= run(
    "train",
    "states",
    "run",
    "--target",
    folder / "target",
    "--context",
    "128",
    "--lr",
    "1e-3",
    "--warmup-steps",
    "2",
    "--tokens-per-step",
    "128",
    "--draft-vocab",
    "64",
    "--block-epochs",
    "1",
    "--simulation-epochs",
    "1",
    "--device",
    "cpu",
)
losses = (
    [json.loads(line).get("loss") for line in open(folder / "run/metrics.jsonl")]
    if (folder / "run/metrics.jsonl").exists()
    else []
)
print(losses[:12])
sys.exit(rc or any(loss is not None and loss != loss for loss in losses))
