"""Prompts that the target writes itself: it goes on from the opening of a user's turn (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.data.answers import Request, write_answers
from beagle_sd.data.chats import user_turn
from beagle_sd.data.evaluation_sets import ngrams, prompts_folder
from beagle_sd.data.prompts.build import barred_ngrams
from beagle_sd.models.ends import end_tokens

_OPENINGS = (
    "Write Explain Given Imagine Solve What Why How Describe Compare Create Design Implement Rewrite Summarize "
    "Translate Classify Extract Pretend Act If A The Consider Suppose You In Find Calculate Edit Analyze Identify Read "
    "Evaluate Compose Draft Help Let Please There Tell Which Who When Is Are Could Should Discuss Provide Outline "
    "Develop Name Give"
).split()
"""First words for half of the prompts, without which most would be pleas for advice."""
_TEMPERATURES = (0.8, 1.0)
_ROUNDS = 8
"""How often more are asked for where some were of no use."""


def written_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    *,
    batch: int = 128,
    max_new_tokens: int = 160,
) -> list[dict]:
    """`count` distinct prompts as `build_prompts` returns them, "source": "target".

    The chat template is rendered up to a user's text, and the model goes on until it ends the turn: what it was trained
    to answer is what it writes. Left out: what reaches max_new_tokens, is empty, or shares eight words in a row with
    an evaluation prompt. The same seed gives the same prompts, up to the model's rounding. Raises ValueError for
    sizes below 1, for a template that has no token for the end of a user's turn, and where the model writes too few.
    """
    before, end = user_turn(tokenizer)
    ends, barred = {*end_tokens(model, tokenizer), end}, barred_ngrams(prompts_folder())
    found: dict[str, None] = {}
    asked = 0
    for _ in range(_ROUNDS):
        # All that are asked for are waited for: the first that are done are the shortest.
        missing = count - len(found)
        if missing <= 0:
            break
        number = missing + missing // 4 + 8
        requests = _requests(tokenizer, before, asked, number, seed)
        written = write_answers(
            model,
            requests,
            ends=ends,
            batch=batch,
            max_new_tokens=max_new_tokens,
            seed=seed,
            states=False,
        )
        start = len(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
        done = sorted((one for one in written if one.final_token in ends), key=lambda one: one.index)
        texts = (str(tokenizer.decode(one.tokens[start:], skip_special_tokens=True)).strip() for one in done)
        found.update(dict.fromkeys(text for text in texts if text and not ngrams(text) & barred))
        asked += number
    if len(found) < count:
        raise ValueError(
            f"of {asked} prompts that the target began, {len(found)} were of use, and count is {count}; "
            "allowed: a target trained on chats, whose user's turns it can write too; else prompts from --mix"
        )
    return [{"messages": [{"role": "user", "content": text}], "source": "target"} for text in list(found)[:count]]


def _requests(tokenizer, before: str, first: int, count: int, seed: int) -> Iterator[Request]:
    for index in range(first, first + count):
        rng = random.Random(f"{seed} {index}")
        opening = rng.choice(_OPENINGS) if rng.random() < 0.5 else ""
        ids = tokenizer(before + opening, add_special_tokens=False, verbose=False)["input_ids"]
        yield Request(index, ids, rng.choice(_TEMPERATURES))
