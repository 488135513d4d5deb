"""Targets whose turn ends with another token than the tokenizer's eos: Gemma (<end_of_turn>), Phi-3 (<|end|>), GLM-4
(<|user|>) list them in generation_config.eos_token_id.

Expected: `prepare --regenerate` ends an answer where target.generate ends it.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from beagle_sd.data.conversations import encode_chat, stored_answers
from beagle_sd.models.smollm2 import converted

folder = pathlib.Path(tempfile.mkdtemp())
tokenizer = AutoTokenizer.from_pretrained(converted())
torch.manual_seed(0)
target = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
).eval()
turns = [{"role": "user", "content": "hi there"}]
ids = torch.tensor([encode_chat(tokenizer, turns)])
free = target.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
turn_end = int(free[4])
target.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
target.save_pretrained(folder / "target")
tokenizer.save_pretrained(folder / "target")
(folder / "prompts.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
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
        "--max-new-tokens",
        "24",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ],
    cwd=folder,
    capture_output=True,
    text=True,
)
stored = stored_answers(folder / "states/answers.npz")
answer = stored["ids"][stored["learn"]].tolist()
want = target.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
print("target.generate:", len(want), "tokens; prepare --regenerate:", len(answer))
print(want, answer[:8])
sys.exit(len(answer) > len(want))
