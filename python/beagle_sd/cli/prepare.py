"""`beagle-sd prepare`: the target runs over conversations, and its states are kept for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from beagle_sd.cli.by_vllm import ByVllm
from beagle_sd.cli.console import (
    Device,
    Dtype,
    Seed,
    TargetName,
    clear_errors,
    dtype_of,
    joined_processes,
    loading,
    print_left_out,
)
from beagle_sd.cli.storing import store
from beagle_sd.data import conversations, shards
from beagle_sd.data.answers import longest_text, requests_of, write_answers
from beagle_sd.data.chats import check_template
from beagle_sd.data.rows import LeftOut
from beagle_sd.data.states import sequences_with_states
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_target
from beagle_sd.training.parallel import of_this_process, summed

_CHATS = (".jsonl", ".json")
_AHEAD = 8
"""How many rows before the first to learn a window of simulation, or of an evaluation, may begin; they see as far
back."""


def prepare(
    source: Annotated[Path, typer.Argument(help="Conversations (.jsonl, .json), text (.txt) or answers (.npz).")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; an unfinished one is gone on with.")],
    target: TargetName = "smollm2-135m",
    regenerate: Annotated[bool, typer.Option(help="Let the target write the answers to the prompts.")] = False,
    batch: Annotated[int, typer.Option(help="Answers written at a time.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 192,
    context: Annotated[int, typer.Option(help="Longest conversation, in tokens; the rest is cut away.")] = 2048,
    window_keys: Annotated[int, typer.Option(help="Store only what a draft with this window uses; 0: all.")] = 0,
    limit: Annotated[int, typer.Option(help="Only the first so many conversations; 0: all.")] = 0,
    strict: Annotated[bool, typer.Option(help="End at a row that cannot be used, instead of leaving it out.")] = False,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    engine: Annotated[str, typer.Option(help="What runs the target: own, or vllm (docs/train.md).")] = "own",
    tensor_parallel: Annotated[int, typer.Option(help="With vllm: GPUs that share the target.")] = 1,
) -> None:
    """Run the target over conversations and store its states for training. Safe to kill and run again.

    Under `torchrun` or `accelerate launch` each process does its share, with --engine own.
    """
    with clear_errors(f"; what is finished is in {out}: run the same command again to go on"):
        sizes: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens, "context": context}
        _check(source, regenerate, {"limit": limit, "window_keys": window_keys}, sizes)
        vllm = _vllm(engine, target, dtype, tensor_parallel, device)
        processes, console = joined_processes("cpu" if vllm else device)
        with processes.main_process_first(), loading(console, target):
            if vllm:
                model, tokenizer = vllm.outline(context, regenerate, processes.num_processes)
            else:
                model, tokenizer = load_target(target, dtype=dtype_of(dtype), device=device or processes.device)
        if source.suffix.lower() in _CHATS:
            check_template(tokenizer)
        manifest = _manifest(model, target, source, regenerate, engine, max_new_tokens, context, window_keys)
        rank = {"process": processes.process_index, "processes": processes.num_processes}
        with processes.main_process_first():
            writer = shards.ShardWriter(out, manifest, **rank)
        done = {sequence.index for sequence in shards.read_sequences(out, with_states=False)}
        left, ends = LeftOut(strict), end_tokens(model, tokenizer)
        rows: Iterator[Any]  # of which each process reads all, so that all count alike
        if regenerate:
            rows = conversations.read_prompts(source, tokenizer, longest_text(model, context) - 1, left)
        else:
            rows = conversations.read_conversations(source, tokenizer, context, ends=ends, left=left)
        pending = [row for row in islice(rows, limit or None) if row[0] not in done]
        local = of_this_process(pending)
        options = {"ends": ends, "seed": seed, **sizes}
        taken: AbstractContextManager[Iterator[shards.Sequence]]
        if vllm:
            taken = vllm.sequences(console, out, local, longest_text(model, context), options if regenerate else None)
        elif regenerate:
            taken = nullcontext(write_answers(model, requests_of(local), **options))
        else:
            taken = nullcontext(sequences_with_states(model, local))
        with taken as sequences:
            if window_keys:
                sequences = (sequence.within(window_keys + _AHEAD) for sequence in sequences)
            processes.wait_for_everyone()  # none writes before all know what is done
            counts = torch.tensor(store(console, sequences, writer, len(local)), device=processes.device)
        written, tokens = summed(counts).tolist()
        if not written and not done:
            raise left.nothing_in(source)
        console.print(_summary(out, written, tokens, len(pending), len(done)))
        print_left_out(console, left)
        if regenerate and processes.is_main_process:
            conversations.export_answers(out, out / "answers.npz", conversations.read_sources(source))
            console.print(f"the answers' token ids alone: {out / 'answers.npz'}")


def _vllm(engine: str, target: str, dtype: str, tensor_parallel: int, device: str | None) -> ByVllm | None:
    """None for our own loop."""
    if engine not in ("own", "vllm"):
        raise ValueError(f"engine is {engine!r}; allowed: own, vllm")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}; allowed: 1 or more")
    if engine == "vllm":
        return ByVllm(target, dtype_of(dtype), tensor_parallel, device)
    if tensor_parallel > 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel} and engine is own; allowed: 1, or --engine vllm")
    return None


def _check(source: Path, regenerate: bool, bounds: dict[str, int], sizes: dict[str, int]) -> None:
    for name, value in bounds.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; allowed: 0 (all) or more")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file; allowed: .jsonl, .json, .txt or .npz")
    if regenerate and source.suffix.lower() not in _CHATS:
        raise ValueError(
            f"{source} ends in {source.suffix!r}; allowed with --regenerate: .jsonl or .json, whose last user turn "
            "the target answers, or every one where there are no answers between them"
        )


def _manifest(
    target: PreTrainedModel,
    name: str,
    source: Path,
    regenerate: bool,
    engine: str,
    max_new_tokens: int,
    context: int,
    window_keys: int,
) -> dict:
    return {
        "target": name,
        "model_type": target.config.model_type,
        "hidden_size": target.config.hidden_size,
        "vocab_size": target.config.vocab_size,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "regenerate": regenerate,
        **({"engine": engine} if regenerate else {}),  # states are the same of both, sampled answers are not
        "max_new_tokens": max_new_tokens if regenerate else None,
        "context": context,
        "window_keys": window_keys or None,
    }


def _summary(out: Path, written: int, tokens: int, pending: int, done: int) -> str:
    notes = [f"{done} were there before"] if done else []
    return "; ".join([f"{written} of {pending + done} conversations, {tokens} tokens, now in {out}", *notes])
