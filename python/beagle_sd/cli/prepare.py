"""`beagle-sd prepare`: the target runs over conversations, and its states are kept for training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

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
    print_left_out,
    progress_bar,
    waiting,
)
from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data import conversations, shards
from beagle_sd.data.answers import longest_text, requests_of, write_answers
from beagle_sd.data.chats import check_template
from beagle_sd.data.rows import LeftOut
from beagle_sd.data.states import sequences_with_states
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_outline, load_target, target_path
from beagle_sd.models.target import Target
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
        _check_engine(engine, tensor_parallel, device)
        processes, console = joined_processes("cpu" if engine == "vllm" else device)
        with processes.main_process_first(), loading(console, target):
            if engine == "vllm":
                model, tokenizer = _outline(target, context, regenerate, processes.num_processes)
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
        longest = longest_text(model, context)
        rows: Iterator[Any]  # of which each process reads all, so that all count alike
        if regenerate:
            rows = conversations.read_prompts(source, tokenizer, longest - 1, left)
        else:
            rows = conversations.read_conversations(source, tokenizer, context, ends=ends, left=left)
        pending = [row for row in islice(rows, limit or None) if row[0] not in done]
        local = of_this_process(pending)
        options = {"ends": ends, "seed": seed, **sizes}
        taken: AbstractContextManager[Iterator[shards.Sequence]]
        if engine == "vllm":
            taken = _by_vllm(
                console, out, local, regenerate, options, (target, dtype_of(dtype), tensor_parallel, longest)
            )
        elif regenerate:
            taken = nullcontext(write_answers(model, requests_of(local), **options))
        else:
            taken = nullcontext(sequences_with_states(model, local))
        with taken as sequences:
            if window_keys:
                sequences = (sequence.within(window_keys + _AHEAD) for sequence in sequences)
            processes.wait_for_everyone()  # none writes before all know what is done
            counts = torch.tensor(_write(console, sequences, writer, len(local)), device=processes.device)
        written, tokens = summed(counts).tolist()
        if not written and not done:
            raise left.nothing_in(source)
        console.print(_summary(out, written, tokens, len(pending), len(done)))
        print_left_out(console, left)
        if regenerate and processes.is_main_process:
            conversations.export_answers(out, out / "answers.npz", conversations.read_sources(source))
            console.print(f"the answers' token ids alone: {out / 'answers.npz'}")


def _check_engine(engine: str, tensor_parallel: int, device: str | None) -> None:
    if engine not in ("own", "vllm"):
        raise ValueError(f"engine is {engine!r}; allowed: own, vllm")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}; allowed: 1 or more")
    if engine == "own" and tensor_parallel > 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel} and engine is own; allowed: 1, or --engine vllm")
    if engine == "vllm":
        from beagle_sd.vllm.checks import check_version

        check_version()
        if device is not None:
            raise ValueError(
                f"device is {device} and engine is vllm; allowed: none, vLLM takes the GPUs that CUDA_VISIBLE_DEVICES "
                "shows it"
            )


def _outline(
    target: str, context: int, regenerate: bool, processes: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target without its weights, checked as far as that goes, and its tokenizer."""
    if processes > 1:
        raise ValueError(
            f"engine is vllm in {processes} joined processes; allowed: one process, without torchrun or accelerate "
            "launch: vLLM starts its own, as many as --tensor-parallel says"
        )
    model, tokenizer = load_outline(target)
    Target(model)
    longest = longest_text(model, context)
    if longest < context and not regenerate:  # where the own engine runs beyond what the target has positions for
        raise ValueError(f"context is {context} and engine is vllm; allowed: up to {longest}, the target's positions")
    return model, tokenizer


@contextmanager
def _by_vllm(
    console: Console, out: Path, local: list, regenerate: bool, options: dict[str, Any], settings: tuple
) -> Iterator[Iterator[shards.Sequence]]:
    """The sequences of this process's rows, as vLLM gives their states. Where it is to write the answers they are
    written first, all of them, into files that are removed once their states are stored."""
    from beagle_sd.vllm import engine, prepare

    how, written = engine.Settings(target_path(settings[0]), *settings[1:]), prepare.Written(out)
    rows: Iterable[conversations.Conversation] = local
    if regenerate:
        answered = written.indices()
        _answer_by_vllm(console, how, [row for row in local if row[0] not in answered], written, **options)
        rows = written.conversations({row[0] for row in local})
    with ExitStack() as stack:
        if local:
            with waiting(console, "vLLM starts, to take states"):
                states = stack.enter_context(engine.giving_states(how))
            yield prepare.sequences_with_states(states, rows)
        else:
            yield iter(())
    if regenerate:
        written.remove({sequence.index for sequence in shards.read_sequences(out, with_states=False)})


def _answer_by_vllm(console: Console, how, rows: list, written, *, ends, batch, max_new_tokens, context, seed) -> None:
    """Write the answers to these prompts into `written`; the engine's processes have ended then."""
    from beagle_sd.vllm import engine, prepare

    if not rows:
        return
    with ExitStack() as stack:
        with waiting(console, "vLLM starts, to write answers"):
            answers = stack.enter_context(engine.answering(how, ends, batch))
        sizes = {"batch": batch, "max_new_tokens": max_new_tokens, "limit": how.longest}
        sequences = prepare.write_answers(answers, requests_of(rows), ends=ends, seed=seed, **sizes)
        _write(console, sequences, written, len(rows), "answers")


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


class _Writer(Protocol):
    """A `shards.ShardWriter`, or what keeps sequences elsewhere in the same way."""

    def add(self, sequence: shards.Sequence) -> None: ...
    def flush(self) -> None: ...


def _write(
    console: Console, sequences: Iterable[shards.Sequence], writer: _Writer, total: int, what: str = "prepare"
) -> tuple[int, int]:
    """Write the sequences as they come, with a progress bar: how many, and their tokens. Ctrl-C keeps what is done."""
    written, tokens, began = 0, 0, time.perf_counter()
    try:
        with progress_bar(console) as progress, deferred_interrupt() as check_interrupt:
            bar = progress.add_task(what, total=total)
            for sequence in sequences:
                writer.add(sequence)
                written, tokens = written + 1, tokens + len(sequence.tokens)
                speed = f"{what}: {tokens / (time.perf_counter() - began):.0f} tokens/s"
                progress.update(bar, advance=1, description=speed)
                check_interrupt()
    finally:
        writer.flush()
    return written, tokens


def _summary(out: Path, written: int, tokens: int, pending: int, done: int) -> str:
    notes = [f"{done} were there before"] if done else []
    return "; ".join([f"{written} of {pending + done} conversations, {tokens} tokens, now in {out}", *notes])
