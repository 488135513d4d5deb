"""Training text to token ids: chats with the loss on the assistant's tokens, plain text, or stored answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_sd.data import shards
from beagle_sd.data.chats import encode_chat, encode_conversation, encode_turns
from beagle_sd.data.rows import LeftOut, Unusable, counting, messages_of, read_records, read_text
from beagle_sd.files import whole

HUMAN = -1.0
"""The temperature noted for text that a person wrote."""
_FILES = ".jsonl or .json of conversations, .txt, or .npz of answers"


class Conversation(NamedTuple):
    """Token ids and, for each, whether the loss counts its prediction; index in the input; temperature or HUMAN."""

    index: int  # type: ignore[assignment]  # tuple.index is not needed
    ids: list[int]
    learn: list[bool]
    temperature: float


def read_conversations(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    ends: Collection[int] | None = None,
    left: LeftOut | None = None,
) -> Iterator[Conversation]:
    """The conversations of a file, cut to `context` tokens; each has at least one token to learn.

    .jsonl, .json: conversations, {"messages": [{"role", "content"}, ...]} or ShareGPT's {"conversations": [{"from",
    "value"}, ...]}, one a line or in one array; .txt: plain text, loss on every token; .npz: answers that `beagle-sd
    prepare --regenerate` wrote. ends: the tokens that end what the assistant says (None: the tokenizer's eos). Rows
    that cannot be used are counted in `left`, or a warning tells of them. Raises FileNotFoundError, and ValueError
    naming the file and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; allowed: {_FILES}")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt", ".npz"):
        raise ValueError(f"{path} ends in {path.suffix!r}; allowed: {_FILES}")
    with counting(left) as found:
        if suffix == ".txt":
            yield from _plain_text(path, tokenizer, context)
        elif suffix == ".npz":
            for one in read_answers(path, None):
                if cut := _cut(one, context, f"{path}: answer {one.index}", found):
                    yield cut
        else:
            yield from _chats(path, tokenizer, context, ends, found)


def _plain_text(path: Path, tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Conversation]:
    """The text in pieces of `context` tokens; a last token alone teaches nothing."""
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    for index, start in enumerate(range(0, len(ids) - 1, context)):
        part = ids[start : start + context]
        if len(part) > 1:
            yield Conversation(index, part, [True] * len(part), HUMAN)


def _chats(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int, ends: Collection[int] | None, left: LeftOut
) -> Iterator[Conversation]:
    for index, place, messages in _turns(path, left):
        try:
            if not any(message["role"] == "assistant" for message in messages):
                raise Unusable("no assistant turn to learn from; the target can write answers with --regenerate")
            ids, learn = encode_conversation(tokenizer, messages, ends)
        except Unusable as reason:
            left.add(place, reason)
        else:
            if cut := _cut(Conversation(index, ids, learn, HUMAN), context, place, left):
                yield cut


def _cut(one: Conversation, context: int, place: str, left: LeftOut) -> Conversation | None:
    """The conversation's first `context` tokens; None, and counted, where none of them is learnt. The first token is
    not: nothing stands before it."""
    if any(one.learn[1:context]):
        return one._replace(ids=one.ids[:context], learn=one.learn[:context])
    too_long = any(one.learn[1:])
    left.add(place, f"too long: no answer within {context} tokens" if too_long else "nothing to learn: no answer in it")
    return None


def read_messages(path: str | Path, left: LeftOut | None = None) -> Iterator[tuple[int, list[dict]]]:
    """The messages of each row of a .jsonl or .json file, with the row's index; roles are system, user and assistant.

    Rows that cannot be used are counted in `left`, or a warning tells of them.
    """
    with counting(left) as found:
        for index, _, messages in _turns(Path(path), found):
            yield index, messages


def _turns(path: Path, left: LeftOut) -> Iterator[tuple[int, str, list[dict]]]:
    for index, place, record in read_records(path, left):
        try:
            messages = messages_of(record)
        except Unusable as reason:
            left.add(place, reason)
        else:
            yield index, place, messages


def read_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, longest: int, left: LeftOut | None = None
) -> Iterator[tuple]:
    """For each row of a .jsonl or .json file (index, ids): those of its messages up to the last user turn, ready for
    the target to answer; at most `longest` ids, else the row is left out, as is one without a user turn.

    A row with several user turns and no assistant's is a chat whose every turn is to be answered: (index, ids, *later),
    where each of `later` is what stands between an answer and the next (`encode_turns`).
    """
    with counting(left) as found:
        for index, place, messages in _turns(Path(path), found):
            turns = [number for number, message in enumerate(messages) if message["role"] == "user"]
            try:
                if not turns:
                    raise Unusable("no user turn to answer")
                if len(turns) > 1 and not any(message["role"] == "assistant" for message in messages):
                    ids, *later = encode_turns(tokenizer, messages[: turns[-1] + 1])
                else:
                    ids, later = encode_chat(tokenizer, messages[: turns[-1] + 1]), []
                if not 1 <= len(ids) <= longest or not all(later):
                    raise Unusable(
                        f"too long: a prompt of more than {longest} tokens" if len(ids) > longest else "an empty prompt"
                    )
            except Unusable as reason:
                found.add(place, reason)
            else:
                yield index, ids, *later


def read_sources(path: str | Path) -> dict[int, str]:
    """Row index -> the "source" that a file's prompt names, "" where it names none."""
    records = ((index, record) for index, _, record in read_records(path, LeftOut()))
    return {index: str(record.get("source") or "") if isinstance(record, dict) else "" for index, record in records}


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
        "learn": np.packbits(np.concatenate([np.append(False, sequence.loss_mask.numpy()) for sequence in sequences])),
        "temperature": np.array([sequence.temperature for sequence in sequences], dtype=np.float32),
        "index": np.array([sequence.index for sequence in sequences], dtype=np.int32),
        "source": np.array([names.index(sources.get(sequence.index, "")) for sequence in sequences], dtype=np.int16),
        "source_names": np.array(names),
    }
    with whole(path) as partial:
        np.savez_compressed(partial, **parts)


def stored_answers(path: str | Path) -> dict[str, np.ndarray]:
    """The parts of a file of answers: ids and learn [all], and lengths, temperature, index [answers].

    An answer's ids are its prompt's, then its own, in a chat several times; learn bool tells its own. ValueError names
    a file that is not whole.
    """
    try:
        with np.load(path) as data:
            # older files, in which every answer has one prompt, lack "learn"
            learn = "learn" if "learn" in data else "prompt_lengths"
            stored = {name: data[name] for name in ("ids", "lengths", learn, "temperature", "index")}
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole answers file ({error}); allowed: an .npz that "
            "`beagle-sd prepare --regenerate` wrote"
        ) from error
    count, lengths = len(stored["index"]), stored["lengths"]
    whole = all(part.shape == (count,) for name, part in stored.items() if name not in ("ids", "learn"))
    integers = all(stored[name].dtype.kind in "iu" for name in ("ids", "lengths", learn, "index"))
    if whole and integers and lengths.min(initial=0) >= 0:
        total = int(lengths.sum())
        if learn == "prompt_lengths":
            position = np.arange(total) - np.repeat(lengths.cumsum() - lengths, lengths)
            stored["learn"] = position >= np.repeat(stored.pop("prompt_lengths"), lengths)
        elif stored["learn"].shape == (-(-total // 8),) and stored["learn"].dtype == np.uint8:
            stored["learn"] = np.unpackbits(stored["learn"], count=total).astype(bool)
        whole = stored["ids"].shape == stored["learn"].shape == (total,) and stored["learn"].dtype == bool
    if not whole or not integers or lengths.min(initial=0) < 0:
        raise ValueError(
            f"{path}: its parts do not belong together; allowed: an .npz that `beagle-sd prepare --regenerate` wrote"
        )
    return stored


def read_answers(path: str | Path, context: int | None) -> Iterator[Conversation]:
    """The conversations of a file of answers, cut to `context` tokens (None: whole)."""
    stored = stored_answers(path)
    start = 0
    for number, length in enumerate(stored["lengths"].tolist()):
        ids = stored["ids"][start : start + length].astype(np.int64).tolist()
        learn = stored["learn"][start : start + length].tolist()
        start += length
        yield Conversation(
            int(stored["index"][number]), ids[:context], learn[:context], float(stored["temperature"][number])
        )
