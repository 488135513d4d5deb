"""A tokenizer small enough to build in a test: one id a character, ChatML's turns as special tokens."""

from __future__ import annotations

import string

from chat_templates import Template
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")


_CHARACTERS = string.ascii_letters + string.digits + " .,:;!?'\"-+*/=()[]<>|_\n"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are SPECIAL, then printable characters; 97 or fewer in all."""
    fast = _tokenizer(SPECIAL, r"[\s\S]", "<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def chat_tokenizer(shape: Template, eos: str = "<|pad|>", words: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with a template and its special tokens; words: a word and the blanks before it are one token, as in
    most vocabularies, most of them unknown."""
    special = dict.fromkeys([*filter(None, [shape.end.strip()]), *shape.others, "<|pad|>"])
    fast = _tokenizer(tuple(special), r"\s*\w+|\s+|[^\w\s]" if words else r"[\s\S]", eos)
    fast.chat_template = shape.text
    return fast


def _tokenizer(special: tuple[str, ...], pieces: str, end: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
