"""Qwen3's template: earlier turns lose their <think> block, the last gets an empty one.

Expected: the mask covers what the assistant says and its end, in every turn. Two tokenizers: the end of sequence is
the turn's end (Qwen3-8B), or another token (Qwen3-8B-Base, whose template is the same).
"""

import sys

from transformers import AutoTokenizer

from beagle_sd.data.conversations import encode_conversation
from beagle_sd.models.smollm2 import converted

TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
turns = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "<think>\nlet me think for quite a while about this\n</think>\n\nA1"},
    {"role": "user", "content": "Q2 is a longer question of the user"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA2"},
]
failed = False
for eos in ("<|im_end|>", "<|endoftext|>"):
    tokenizer = AutoTokenizer.from_pretrained(converted(), eos_token=eos)
    tokenizer.chat_template = TEMPLATE
    try:
        ids, learn = encode_conversation(tokenizer, turns)
    except ValueError as error:
        print(eos, "refused:", error)
        failed = True
        continue
    learned = [tokenizer.decode([i for i, on in zip(ids, learn) if on])]
    print(eos, learned)
    failed |= "Q2" in learned[0] or "<|im_start|>" in learned[0] or "A1" not in learned[0] or "A2" not in learned[0]
sys.exit(failed)
