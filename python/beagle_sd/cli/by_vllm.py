"""`prepare --engine vllm`: a target that vLLM runs, in place of our own loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.cli.console import waiting
from beagle_sd.cli.storing import store
from beagle_sd.data import shards
from beagle_sd.data.answers import longest_text, requests_of
from beagle_sd.data.conversations import Conversation
from beagle_sd.models.loading import load_outline, target_path
from beagle_sd.models.target import Target
from beagle_sd.vllm import engine, prepare
from beagle_sd.vllm.checks import check_version


class ByVllm:
    """A target by name, its dtype (None: bf16 on a GPU, fp32 on a CPU), and how many GPUs share it.

    Raises ValueError where vLLM is not installed or was not tried in its version, or a device is named.
    """

    def __init__(self, target: str, dtype: torch.dtype | None, tensor_parallel: int, device: str | None):
        check_version()
        if device is not None:
            raise ValueError(
                f"device is {device} and engine is vllm; allowed: none, vLLM takes the GPUs that CUDA_VISIBLE_DEVICES "
                "shows it"
            )
        self.target, self.dtype, self.tensor_parallel = target, dtype, tensor_parallel

    def outline(
        self, context: int, regenerate: bool, processes: int
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The target without its weights, checked as far as that goes, and its tokenizer; ValueError where several
        processes are joined, or texts would be longer than vLLM takes."""
        if processes > 1:
            raise ValueError(
                f"engine is vllm in {processes} joined processes; allowed: one, without torchrun or accelerate launch: "
                "vLLM starts its own, as many as --tensor-parallel says"
            )
        model, tokenizer = load_outline(self.target)
        Target(model)
        longest = longest_text(model, context)
        if longest < context and not regenerate:  # our own loop goes on beyond the positions
            raise ValueError(
                f"context is {context} and engine is vllm; allowed: up to {longest}, the target's positions"
            )
        return model, tokenizer

    @contextmanager
    def sequences(
        self, console: Console, out: Path, rows: list, longest: int, answers: dict[str, Any] | None
    ) -> Iterator[Iterator[shards.Sequence]]:
        """The rows' sequences as vLLM gives their states, inside the block; after it, what was kept for them in `out`
        is removed where they are stored.

        rows: conversations; or prompts, with how they are answered (`answers`): all answers are written first.
        """
        settings = engine.Settings(target_path(self.target), self.dtype, self.tensor_parallel, longest)
        written = prepare.Written(out)
        conversations: Iterable[Conversation] = rows
        if answers is not None:
            answered = written.indices()
            if unanswered := [row for row in rows if row[0] not in answered]:
                _write_answers(console, settings, unanswered, written, **answers)
            conversations = written.conversations({row[0] for row in rows})
        with ExitStack() as stack:
            yield _states(console, stack, settings, conversations) if rows else iter(())
        if shards.written_paths(out):
            written.remove({sequence.index for sequence in shards.read_sequences(out, with_states=False)})


def _write_answers(
    console: Console, settings: engine.Settings, rows: list, written: prepare.Written, *, batch: int, **how: Any
) -> None:
    """Answers to these prompts into `written`; the engine's processes have ended then."""
    sizes = {"batch": batch, "max_new_tokens": how["max_new_tokens"], "limit": settings.longest}
    with ExitStack() as stack:
        with waiting(console, "starting vLLM to write answers"):
            running = stack.enter_context(engine.answering(settings, how["ends"], batch))
        answers = prepare.write_answers(running, requests_of(rows), ends=how["ends"], seed=how["seed"], **sizes)
        store(console, answers, written, len(rows), "answers")


def _states(
    console: Console, stack: ExitStack, settings: engine.Settings, conversations: Iterable[Conversation]
) -> Iterator[shards.Sequence]:
    with waiting(console, "starting vLLM to take states"):
        running = stack.enter_context(engine.giving_states(settings))
    return prepare.sequences_with_states(running, conversations)
