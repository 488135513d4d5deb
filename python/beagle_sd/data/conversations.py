"""Training text to token ids: chats with the loss on the assistant's tokens, plain text, or stored answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_sd.data import shards
from beagle_sd.files import whole

HUMAN = -1.0
"""The temperature noted for text that a person wrote."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Conversation(NamedTuple):
    """Token ids and, for each, whether the loss counts its prediction; index in the input; temperature or HUMAN."""

    index: int  # type: ignore[assignment]  # tuple.index is not needed
    ids: list[int]
    learn: list[bool]
    temperature: float


def read_conversations(path: str | Path, tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Conversation]:
    """The conversations of a file, cut to `context` tokens.

    .jsonl: a conversation a line, {"messages": [{"role", "content"}, ...]} or ShareGPT's {"conversations":
    [{"from", "value"}, ...]}; .txt: plain text, loss on every token; .npz: answers that `beagle-sd prepare
    --regenerate` wrote. Raises ValueError naming file, line and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; allowed: .jsonl of conversations, .txt, or .npz of answers")
    if path.suffix == ".npz":
        yield from read_answers(path, context)
    elif path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); allowed: UTF-8") from error
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for index, start in enumerate(range(0, len(ids), context)):
            part = ids[start : start + context]
            yield Conversation(index, part, [True] * len(part), HUMAN)
    elif path.suffix == ".jsonl":
        for index, messages in read_messages(path):
            if not any(message["role"] == "assistant" for message in messages):
                raise ValueError(
                    f"{path}: line {index + 1} has no assistant turn to learn from; "
                    "allowed: at least one, or let the target write answers with --regenerate"
                )
            ids, learn = encode_conversation(tokenizer, messages)
            yield Conversation(index, ids[:context], learn[:context], HUMAN)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; allowed: .jsonl, .txt, .npz")


def read_messages(path: str | Path) -> Iterator[tuple[int, list[dict]]]:
    """The messages of each line of a JSONL file, with the line's index; roles are system, user and assistant."""
    with Path(path).open("rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                turns = record.get("messages") or record["conversations"]
                messages = [
                    {
                        "role": _ROLES[turn.get("role") or turn["from"]],
                        "content": str(turn["content"] if "content" in turn else turn["value"]),
                    }
                    for turn in turns
                ]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {index + 1} is not a conversation ({error!r}); allowed: "
                    '{"messages": [{"role": "user", "content": "..."}, ...]}'
                ) from error
            if not messages:
                raise ValueError(f"{path}: line {index + 1} has no messages; allowed: at least one")
            yield index, messages


def read_prompts(path: str | Path) -> Iterator[tuple[int, list[dict]]]:
    """Each line's messages up to its last user turn, for the target to answer, with the line's index."""
    for index, messages in read_messages(path):
        turns = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not turns:
            raise ValueError(f"{path}: line {index + 1} has no user turn to answer; allowed: at least one")
        yield index, messages[: turns[-1] + 1]


def read_sources(path: str | Path) -> dict[int, str]:
    """Line index -> the "source" that a JSONL file's prompt names, "" where it names none."""
    with Path(path).open("rb") as file:
        return {index: str(json.loads(line).get("source", "")) for index, line in enumerate(file) if line.strip()}


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The chat template's ids, ready for the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Ids of the chat template, and a mask of what the assistant says, its end token included."""

    def render(upto: int, prompt: bool):
        return tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, tokenize=False)

    text = render(len(messages), False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learn = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, end = len(render(number, True)), len(render(number + 1, False))
        if not text.startswith(render(number, True)):
            raise ValueError(
                "this chat template rewrites earlier turns, so the assistant's tokens cannot be found; "
                "allowed: templates that only append"
            )
        for position, (start, stop) in enumerate(offsets):
            if begin <= start and stop <= end:
                learn[position] = True
                if ids[position] == tokenizer.eos_token_id:
                    break
    return ids, learn


def export_answers(folder: str | Path, path: str | Path, sources: dict[int, str]) -> int:
    """Write the token ids of all sequences of a shard folder to a compressed .npz; returns how many.

    sources: index -> where its prompt came from.
    """
    sequences = sorted(shards.read_sequences(folder, with_states=False), key=lambda sequence: sequence.index)
    write_answer_file(path, sequences, sources)
    return len(sequences)


def write_answer_file(path: str | Path, sequences: list[shards.Sequence], sources: dict[int, str]) -> None:
    """Write sequences' token ids, without states, to a compressed .npz, which appears whole or not at all."""
    names = sorted({sources.get(sequence.index, "") for sequence in sequences})
    ids = np.concatenate([np.append(sequence.tokens.numpy(), sequence.final_token) for sequence in sequences])
    parts: dict[str, Any] = {
        "ids": ids.astype(np.uint16 if ids.max() < 65536 else np.uint32),
        "lengths": np.array([len(sequence.tokens) + 1 for sequence in sequences], dtype=np.int32),
        "prompt_lengths": np.array([int((~sequence.loss_mask).sum()) + 1 for sequence in sequences], dtype=np.int32),
        "temperature": np.array([sequence.temperature for sequence in sequences], dtype=np.float32),
        "index": np.array([sequence.index for sequence in sequences], dtype=np.int32),
        "source": np.array([names.index(sources.get(sequence.index, "")) for sequence in sequences], dtype=np.int16),
        "source_names": np.array(names),
    }
    with whole(path) as partial:
        np.savez_compressed(partial, **parts)


def stored_answers(path: str | Path) -> dict[str, np.ndarray]:
    """The parts of a file of answers: ids [all], and lengths, prompt_lengths, temperature, index [answers].

    An answer's ids are its prompt's, then its own. ValueError names a file that is not whole.
    """
    try:
        with np.load(path) as data:
            stored = {name: data[name] for name in ("ids", "lengths", "prompt_lengths", "temperature", "index")}
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole answers file ({error}); allowed: an .npz that "
            "`beagle-sd prepare --regenerate` wrote"
        ) from error
    count, lengths = len(stored["index"]), stored["lengths"]
    whole = all(part.shape == (count,) for name, part in stored.items() if name != "ids")
    integers = all(stored[name].dtype.kind in "iu" for name in ("ids", "lengths", "prompt_lengths", "index"))
    if not whole or not integers or lengths.min(initial=0) < 0 or stored["ids"].shape != (lengths.sum(),):
        raise ValueError(
            f"{path}: its parts do not belong together; allowed: an .npz that `beagle-sd prepare --regenerate` wrote"
        )
    return stored


def read_answers(path: str | Path, context: int) -> Iterator[Conversation]:
    """The conversations of a file of answers."""
    stored = stored_answers(path)
    start = 0
    for number, length in enumerate(stored["lengths"].tolist()):
        ids = stored["ids"][start : start + length].astype(np.int64).tolist()
        start += length
        learn = [position >= int(stored["prompt_lengths"][number]) for position in range(length)]
        yield Conversation(
            int(stored["index"][number]), ids[:context], learn[:context], float(stored["temperature"][number])
        )
