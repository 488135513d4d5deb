"""Chat templates in the shapes of real models', each with its special tokens, its end of turn first."""

from __future__ import annotations

from typing import NamedTuple


class Template(NamedTuple):
    """end: what the assistant's turn ends with as learnt; others: further special tokens; text: the template."""

    end: str
    others: tuple[str, ...]
    text: str


_CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_SPLIT = (
    "{% set c = m.content %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)

CHATML = Template(
    "<|im_end|>", ("<|im_start|>",), "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT
)
QWEN25 = Template(
    "<|im_end|>",
    ("<|im_start|>",),
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML.text,
)
QWEN3 = Template(
    "<|im_end|>",
    ("<|im_start|>",),
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}" + _SPLIT + "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
    "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT,
)
QWEN3_THINKING = QWEN3._replace(text=QWEN3.text.removesuffix("{% endif %}") + "<think>\n{% endif %}")
LLAMA3 = Template(
    "<|eot_id|>",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
)
GEMMA = Template(
    "<end_of_turn>",
    ("<bos>", "<start_of_turn>"),
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
)
MISTRAL = Template(
    "</s>",
    ("<s>", "[INST]", "[/INST]"),
    "<s>{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content + '\n\n' %}"
    "{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ s if loop.last or loop.index0 == rest | length - 2 }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}",
)
LLAMA2 = Template(
    " </s>",
    ("<s>",),
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} </s>"
    "{% else %}<s>[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
)
PHI3 = Template(
    "<|end|>",
    ("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
)
R1_DISTILLED = Template(
    "<|end_of_sentence|>",
    ("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>"),
    "<|begin_of_sentence|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
)
NUMBERED = CHATML._replace(
    text="{% for m in messages %}{{ loop.index }} of {{ messages | length }}: " + _CHATML_TURN + "{% endfor %}"
)
MARKED = CHATML._replace(
    text="{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + _CHATML_TURN + "{% endgeneration %}"
    "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT
)
PARTS_ALONE = CHATML._replace(
    text="{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}" + _CHATML_PROMPT
)
HEADERS_ALONE = Template(
    "", ("<|user|>", "<|assistant|>"), "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
)
WORDS_ALONE = Template("", (), "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}")
