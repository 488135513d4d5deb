"""Prompts of a given length for the measurement of long texts: documents and code with a question, and chats."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from beagle_sd.data.answers import Request, write_answers
from beagle_sd.data.chats import encode_turns
from beagle_sd.data.conversations import encode_chat
from beagle_sd.data.evaluation_sets import EVALUATION_TEXTS, evaluation_prompts, evaluation_text
from beagle_sd.data.shards import Sequence
from beagle_sd.models.ends import end_tokens

KINDS = ("documents", "chats", "code")
_ANSWER = 128
"""Tokens of a chat's answer at most."""


def prompts_of(
    kind: str, target, tokenizer, lengths: list[int], count: int, folder: Path | None = None
) -> dict[int, list[list[int]]]:
    """Length -> `count` prompts of about so many ids at most, the same texts at each length.

    Documents and code are cut to the length, the question behind them. Chats are MT-Bench's turns in order, each
    answered greedily by the target, as many as come before the same last question within the length; where none does,
    that question alone. folder: where the files are; default the user's cache, into which they are downloaded. Raises
    ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if kind == "chats":
        return _chats(target, tokenizer, lengths, count, folder)
    found: dict[int, list[list[int]]] = {length: [] for length in lengths}
    for chosen in EVALUATION_TEXTS[kind][:count]:
        text = evaluation_text(chosen, folder, download=folder is None)
        for length, prompts in found.items():
            prompts.append(_asked(tokenizer, text, chosen.question, chosen.language, length))
    return found


def _asked(tokenizer, text: str, question: str, language: str, length: int) -> list[int]:
    """The prompt's ids: the text's beginning, in a fence if it is code, with the question behind it."""
    before, behind = (f"```{language}\n", "\n```\n\n") if language else ("", "\n\n")
    around = len(encode_chat(tokenizer, [{"role": "user", "content": before + behind + question}]))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: max(0, length - around)]
    content = before + tokenizer.decode(ids) + behind + question
    return encode_chat(tokenizer, [{"role": "user", "content": content}])


def _chats(target, tokenizer, lengths: list[int], count: int, folder: Path | None) -> dict[int, list[list[int]]]:
    questions = evaluation_prompts("mt-bench", folder, download=folder is None)
    requests, asked = [], []
    for number in range(count):
        first = number * len(questions) // count
        last = questions[first]["turns"][0]
        turns = [turn for question in questions[first + 1 :] + questions[:first] for turn in question["turns"]]
        ids, *later = _turns_within(tokenizer, turns, max(lengths))
        requests.append(Request(number, ids, 0.0, tuple(later)))
        asked.append((encode_turns(tokenizer, _said(last))[0], encode_turns(tokenizer, _said(turns[0], last))[1]))
    written = write_answers(
        target,
        requests,
        ends=end_tokens(target, tokenizer),
        batch=count * (1 + max(lengths) // 256),  # as much room as lets all chats be written together
        max_new_tokens=_ANSWER,
        context=max(lengths) + _ANSWER,
        states=False,
    )
    chats = sorted(written, key=lambda chat: chat.index)
    return {
        length: [_asked_last(chat, requests[chat.index].later, *asked[chat.index], length) for chat in chats]
        for length in lengths
    }


def _asked_last(
    chat: Sequence, later: tuple[list[int], ...], alone: list[int], behind: list[int], length: int
) -> list[int]:
    """The ids of a question behind as many of the chat's turns with their answers as come within the length, or alone.
    later: the ids between the chat's answers."""
    learnt = [False, *chat.loss_mask.tolist()]
    begins = [place for place in range(1, len(learnt)) if learnt[place] and not learnt[place - 1]]
    ends = [begin - len(between) for begin, between in zip(begins[1:], later)]
    within = [end for end in ends if end + len(behind) <= length]
    return chat.tokens[: within[-1]].tolist() + behind if within else alone


def _turns_within(tokenizer, turns: list[str], length: int) -> list[list[int]]:
    """The ids of a chat of these turns, as many as may come within the length."""
    sizes = accumulate(len(tokenizer(turn, add_special_tokens=False, verbose=False)["input_ids"]) for turn in turns)
    kept = max(1, sum(size <= length for size in sizes))
    return encode_turns(tokenizer, _said(*turns[:kept]))


def _said(*turns: str) -> list[dict]:
    return [{"role": "user", "content": turn} for turn in turns]
