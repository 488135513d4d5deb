"""`beagle-sd prepare`: the target runs over conversations, and its states are kept for training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.cli.console import (
    Device,
    Dtype,
    Seed,
    TargetName,
    clear_errors,
    dtype_of,
    joined_processes,
    loading,
    progress_bar,
)
from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data import conversations, shards
from beagle_sd.data.answers import requests_of, write_answers
from beagle_sd.data.states import sequences_with_states
from beagle_sd.models.loading import load_target
from beagle_sd.training.parallel import of_this_process, summed


def prepare(
    source: Annotated[Path, typer.Argument(help="Conversations (.jsonl), plain text (.txt) or answers (.npz).")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; an unfinished one is gone on with.")],
    target: TargetName = "smollm2-135m",
    regenerate: Annotated[bool, typer.Option(help="Let the target write the answers to the prompts.")] = False,
    batch: Annotated[int, typer.Option(help="Answers written at a time.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 192,
    context: Annotated[int, typer.Option(help="Longest conversation, in tokens.")] = 2048,
    limit: Annotated[int, typer.Option(help="Only the first so many conversations; 0: all.")] = 0,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Run the target over conversations and store its states for training. Safe to kill and run again.

    Under `torchrun` or `accelerate launch` each process does its share.
    """
    with clear_errors(f"; what is finished is in {out}: run the same command again to go on"):
        _check(source, regenerate, limit, {"batch": batch, "max_new_tokens": max_new_tokens, "context": context})
        processes, console = joined_processes(device)
        with processes.main_process_first(), loading(console, target):
            model, tokenizer = load_target(target, dtype=dtype_of(dtype), device=device or processes.device)
        manifest = _manifest(model, target, source, regenerate, max_new_tokens, context)
        rank = {"process": processes.process_index, "processes": processes.num_processes}
        with processes.main_process_first():
            writer = shards.ShardWriter(out, manifest, **rank)
        done = {sequence.index for sequence in shards.read_sequences(out, with_states=False)}
        pending = _pending(source, tokenizer, regenerate, context, limit, done)
        local = of_this_process(pending)
        sequences = sequences_with_states(model, local)
        if regenerate:
            settings = {"batch": batch, "max_new_tokens": max_new_tokens, "seed": seed}
            sequences = _answers(model, tokenizer, local, settings)
        processes.wait_for_everyone()  # none writes before all know what is done
        counts = torch.tensor(_write(console, sequences, writer, len(local)), device=model.device)
        written, tokens = summed(counts).tolist()
        console.print(_summary(out, written, tokens, len(pending), len(done)))
        if not written and not done:
            why = f"all {len(pending)} conversations are too short or too long" if pending else "it is empty"
            raise ValueError(f"{source} holds nothing to learn from: {why}")
        if regenerate and processes.is_main_process:
            conversations.export_answers(out, out / "answers.npz", conversations.read_sources(source))
            console.print(f"the answers' token ids alone: {out / 'answers.npz'}")


def _check(source: Path, regenerate: bool, limit: int, sizes: dict[str, int]) -> None:
    if limit < 0:
        raise ValueError(f"limit is {limit}; allowed: 0 (all conversations) or more")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file; allowed: .jsonl, .txt or .npz")
    if regenerate and source.suffix != ".jsonl":
        raise ValueError(
            f"{source} ends in {source.suffix!r}; allowed with --regenerate: .jsonl, whose last user turn "
            "the target answers"
        )


def _manifest(
    target: PreTrainedModel, name: str, source: Path, regenerate: bool, max_new_tokens: int, context: int
) -> dict:
    return {
        "target": name,
        "model_type": target.config.model_type,
        "hidden_size": target.config.hidden_size,
        "vocab_size": target.config.vocab_size,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "regenerate": regenerate,
        "max_new_tokens": max_new_tokens if regenerate else None,
        "context": None if regenerate else context,
    }


def _pending(
    source: Path, tokenizer: PreTrainedTokenizerBase, regenerate: bool, context: int, limit: int, done: set[int]
) -> list[Any]:
    """What is still to be done: (index, messages) to be answered, or conversations."""
    if regenerate:
        prompts = islice(conversations.read_prompts(source), limit or None)
        return [(index, messages) for index, messages in prompts if index not in done]
    read = islice(conversations.read_conversations(source, tokenizer, context), limit or None)
    return [conversation for conversation in read if conversation.index not in done]


def _answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, list[dict]]],
    settings: dict[str, Any],
) -> Iterator[shards.Sequence]:
    encoded = ((index, conversations.encode_chat(tokenizer, messages)) for index, messages in prompts)
    return write_answers(target, requests_of(encoded), end=tokenizer.eos_token_id, **settings)


def _write(
    console: Console, sequences: Iterable[shards.Sequence], writer: shards.ShardWriter, total: int
) -> tuple[int, int]:
    """Write the sequences as they come, with a progress bar: how many, and their tokens. Ctrl-C keeps what is done."""
    written, tokens, began = 0, 0, time.perf_counter()
    try:
        with progress_bar(console) as progress, deferred_interrupt() as check_interrupt:
            bar = progress.add_task("prepare", total=total)
            for sequence in sequences:
                writer.add(sequence)
                written, tokens = written + 1, tokens + len(sequence.tokens)
                progress.update(bar, advance=1, description=f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
                check_interrupt()
    finally:
        writer.flush()
    return written, tokens


def _summary(out: Path, written: int, tokens: int, pending: int, done: int) -> str:
    notes = [f"{done} were there before"] if done else []
    notes += [f"{pending - written} are too short or too long"] if written < pending else []
    return "; ".join([f"{written} of {pending + done} conversations, {tokens} tokens, now in {out}", *notes])
