"""Prompts that the target writes itself: it goes on from the opening of a user's turn (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import math
import random

from torch import Tensor
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
_LEAST = 0.1
"""The share of use that a round reckons with at least."""


def written_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    *,
    batch: int = 128,
    max_new_tokens: int = 160,
) -> list[dict]:
    """`count` distinct prompts as `build_prompts` returns them, "source": "target"; fewer where the target writes
    little of use.

    The chat template is rendered up to a user's text, and the model goes on until it ends the turn: what it was trained
    to answer is what it writes. Left out: what reaches max_new_tokens, is empty, or shares eight words in a row with
    an evaluation prompt, as far as those are in the cache. The same seed gives the same prompts, up to the model's
    rounding. Raises ValueError for a negative count, for sizes below 1, for a template that has no token for the end of
    a user's turn, and where nothing is of use.
    """
    if count < 0:
        raise ValueError(f"count is {count}; allowed: 0 or more")
    if count == 0:
        return []
    turn = _UserTurn(tokenizer)
    ends, barred = {*end_tokens(model, tokenizer), turn.end}, barred_ngrams(prompts_folder())
    found: dict[str, None] = {}
    asked, share = 0, 0.8
    for _ in range(_ROUNDS):
        number = math.ceil((count - len(found)) / share) + 8
        # All that are asked for are waited for: the first that are done are the shortest.
        written = write_answers(
            model,
            (turn.request(seed, index) for index in range(asked, asked + number)),
            ends=ends,
            batch=min(batch, number),
            max_new_tokens=max_new_tokens,
            seed=seed,
            states=False,
        )
        done = sorted((one for one in written if one.final_token in ends), key=lambda one: one.index)
        texts = map(turn.text, (one.tokens for one in done))
        found.update(dict.fromkeys(text for text in texts if text and not ngrams(text) & barred))
        asked += number
        share = max(_LEAST, len(found) / asked)
        if len(found) >= count:
            break
    if not found:
        raise ValueError(
            f"of {asked} prompts that the target began none was of use; allowed: a target trained on chats, whose "
            "user's turns it can write too; else prompts from --mix"
        )
    return [{"messages": [{"role": "user", "content": text}], "source": "target"} for text in list(found)[:count]]


class _UserTurn:
    """A chat up to a user's text: its ids, and the token that ends the turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before, self.end = user_turn(tokenizer)
        # A blank at the end is the first word's, in most tokenizers: the model writes it.
        self.ids = self._ids(self.before.rstrip(" "))

    def request(self, seed: int, index: int) -> Request:
        """To go on from, half of the time with a first word; without one too where its tokens do not begin where the
        template's end."""
        rng = random.Random(f"{seed} {index}")
        opening = rng.choice(_OPENINGS) if rng.random() < 0.5 else ""
        ids = self._ids(self.before + opening) if opening else self.ids
        ids = ids if ids[: len(self.ids)] == self.ids else self.ids
        return Request(index, ids, rng.choice(_TEMPERATURES))

    def text(self, tokens: Tensor) -> str:
        """What the user says in a text that began with these ids."""
        return str(self.tokenizer.decode(tokens[len(self.ids) :], skip_special_tokens=True)).strip()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
