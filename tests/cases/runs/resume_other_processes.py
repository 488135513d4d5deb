"""`beagle-sd train` under torchrun with 2 processes, stopped, gone on with 1 (a node was lost), and the other way.

Expected: goes on (the docs: how a step is shared changes rounding only), or a clear refusal. Takes minutes.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from beagle_sd.models.smollm2 import converted

folder = pathlib.Path(tempfile.mkdtemp())
env = {**os.environ, "OMP_NUM_THREADS": "1"}
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
words = "the cat sat on a mat and looked at the moon over a river".split()
with open(folder / "chats.jsonl", "w") as file:
    for _ in range(60):
        file.write(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": " ".join(random.choices(words, k=8))},
                        {"role": "assistant", "content": " ".join(random.choices(words, k=30))},
                    ]
                }
            )
            + "\n"
        )


def say(*parts):
    print(*parts, flush=True)


def run(processes, *args, kill_after=None):
    line = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "beagle_sd"]
        if processes > 1
        else [sys.executable, "-m", "beagle_sd"]
    ) + list(map(str, args))
    log = open(folder / "log.txt", "w+")
    child = subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    if kill_after is not None:
        while child.poll() is None and not list((folder / "run").glob(kill_after)):
            time.sleep(0.2)
        for one in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
            one.kill()
    child.wait()
    log.seek(0)
    text = log.read()
    return child.returncode, text


rc, text = run(1, "prepare", "chats.jsonl", "states", "--target", folder / "target", "--device", "cpu")
say("prepare", rc, text.strip().splitlines()[-1][:120])
common = [
    "states",
    "run",
    "--target",
    folder / "target",
    "--lr",
    "1e-3",
    "--warmup-steps",
    "5",
    "--tokens-per-step",
    "256",
    "--draft-vocab",
    "64",
    "--block-epochs",
    "4",
    "--simulation-epochs",
    "4",
    "--eval-steps",
    "40",
    "--save-steps",
    "5",
    "--device",
    "cpu",
]
failed = rc != 0
rc, text = run(2, "train", *common, kill_after="checkpoint*")
say("2 processes, killed:", rc, sorted(p.name for p in (folder / "run").iterdir())[:6])
rc, text = run(1, "train", *common)
say("gone on with 1:", rc, text.strip().splitlines()[-1][:160])
failed |= rc != 0
say([line for line in text.splitlines() if "at step" in line or "error" in line][:3])
sys.exit(failed)
