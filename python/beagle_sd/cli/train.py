"""`beagle-sd train`: a draft in two stages, on stored or live states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.cli.console import (
    Device,
    TargetName,
    clear_errors,
    joined_processes,
    loading,
    print_left_out,
    progress_bar,
)
from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data import conversations, shards
from beagle_sd.data.dataset import PackedDataset, StateDataset
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.data.rows import LeftOut
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_draft, load_target
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.parallel import same_everywhere
from beagle_sd.training.start import passing_start_on
from beagle_sd.training.trainer import Trainer


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of TrainingConfig, given to it as `settings`."""
    hints = get_type_hints(TrainingConfig)

    @wraps(command)
    def wrapped(**options) -> None:
        settings = {field.name: options.pop(field.name) for field in fields(TrainingConfig)}
        command(**options, settings=settings)

    signature = inspect.signature(command, eval_str=True)
    given = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["help"])],
        )
        for field in fields(TrainingConfig)
    ]
    wrapped.__signature__ = signature.replace(parameters=given + options)  # type: ignore[attr-defined]
    return wrapped


_FREQUENT = "Most frequent tokens the draft may propose"
_HEADS = "The draft's; more carry more of a state."
_APPEND = "Let nodes see their ancestors' draft states."
_WINDOW = "Last keys of the text that the draft sees"


@with_settings
def train(
    data: Annotated[Path, typer.Argument(help="Folder from `prepare`, or a file it takes: states live, none stored.")],
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints; an unfinished run is gone on with.")],
    more: Annotated[
        list[Path] | None, typer.Option(help="A further folder from `prepare`; may be given again.")
    ] = None,
    target: TargetName = "smollm2-135m",
    from_draft: Annotated[
        Path | None, typer.Option(help="A draft's folder to begin from: its shape, a fresh optimizer.")
    ] = None,
    draft_vocab: Annotated[int | None, typer.Option(help=f"{_FREQUENT}; 0: all.", show_default="8192")] = None,
    key_value_heads: Annotated[int | None, typer.Option(help=_HEADS, show_default="the target's")] = None,
    append_states: Annotated[bool | None, typer.Option(help=_APPEND, show_default="append-states")] = None,
    window_keys: Annotated[int | None, typer.Option(help=f"{_WINDOW}; 0: all.", show_default="0")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard, in OUT/tensorboard.")] = False,
    device: Device = None,
    *,
    settings: dict,
) -> None:
    """Train a draft in two stages: block attention, then one-pass simulation. Safe to kill and run again.

    Under `torchrun` or `accelerate launch` each process does its share.
    """
    with clear_errors(f"; the last checkpoint is in {out}: run the same command again to go on"):
        config = TrainingConfig(**settings)
        processes, console = joined_processes(device)
        with processes.main_process_first(), loading(console, target):
            model, tokenizer = load_target(target, device=device or processes.device, weights="floats")
        left = LeftOut()
        dataset = _dataset([data, *(more or [])], model, tokenizer, config, left)
        print_left_out(console, left)
        shape = {"draft_vocab": draft_vocab, "key_value_heads": key_value_heads, "append_states": append_states}
        torch.manual_seed(config.seed)
        draft = _fresh(model, dataset, shape) if from_draft is None else _from(from_draft, model, dataset, shape)
        if window_keys is not None and window_keys < 0:
            raise ValueError(f"window_keys is {window_keys}; allowed: 0 (all) or more")
        if window_keys is not None:
            draft.config.window_keys = window_keys or None
        trainer = Trainer(draft, dataset, out, config, tensorboard=tensorboard)
        if trainer.step == 0 and from_draft is None:
            same_everywhere(passing_start_on(draft, dataset, config.seed).parameters())
        console.print(
            f"{len(dataset.train)} sequences, {dataset.tokens_of(dataset.train)} tokens; {trainer.block_steps} steps "
            f"of stage 1, {trainer.total_steps - trainer.block_steps} of stage 2; at step {trainer.step}"
        )
        _run(trainer, console, alone=processes.num_processes == 1)
        console.print(f"the draft is in {out / 'final'}")


def _fresh(model: PreTrainedModel, dataset: PackedDataset, shape: dict[str, Any]) -> BeagleDraft:
    ids = _vocab(model, dataset, 8192 if shape["draft_vocab"] is None else shape["draft_vocab"])
    heads = {"num_key_value_heads": shape["key_value_heads"]} if shape["key_value_heads"] else {}
    return BeagleDraft.from_target(model, ids, append_states=shape["append_states"] is not False, **heads)


def _from(folder: Path, model: PreTrainedModel, dataset: PackedDataset, shape: dict[str, Any]) -> BeagleDraft:
    """The draft of a folder in fp32, of whose shape the options may change the vocabulary alone."""
    draft_vocab = shape["draft_vocab"]
    fixed = {name: value for name, value in shape.items() if name != "draft_vocab"}
    if given := ["--" + name.replace("_", "-") for name, value in fixed.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)} given with --from-draft; allowed: the shape of the draft in {folder} as it is, with "
            "another --draft-vocab or --window-keys"
        )
    draft = load_draft(folder, model, torch.float32)
    return draft if draft_vocab is None else draft.set_draft_vocab(_vocab(model, dataset, draft_vocab))


def _vocab(model: PreTrainedModel, dataset: PackedDataset, count: int) -> Tensor | None:
    """The ids of the most frequent tokens to learn; None: all."""
    return dataset.frequent_tokens(count, model.config.vocab_size) if count else None


def _dataset(
    data: list[Path],
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    left: LeftOut,
) -> PackedDataset:
    """The shards of folders, or the conversations of a file, whose states the target computes; rows of the file that
    cannot be used are counted in `left`."""
    if files := [path for path in data if path.is_file()]:
        if len(data) > 1:
            raise ValueError(
                f"{files[0]} is a file, and --more is given; allowed: one file alone, or folders from `prepare`"
            )
        ends = end_tokens(target, tokenizer)
        found = conversations.read_conversations(files[0], tokenizer, config.context, ends=ends, left=left)
        corpus = Corpus.of(found)
        if not len(corpus.ids):
            raise left.nothing_in(files[0])
        return LiveDataset(target, corpus, context=config.context, held_out=config.held_out)
    for folder in data:
        shards.check_manifest(folder, hidden_size=target.config.hidden_size, vocab_size=target.config.vocab_size)
    return StateDataset(*data, context=config.context, held_out=config.held_out)


def _run(trainer: Trainer, console, alone: bool) -> None:
    """Train with a progress bar; Ctrl-C takes effect after a step, with a checkpoint, unless other processes would not
    hear of it at the same step."""
    interruptible = deferred_interrupt() if alone else nullcontext(lambda first: None)
    with progress_bar(console) as progress, interruptible as check_interrupt:
        bar = progress.add_task("train", total=trainer.total_steps, completed=trainer.step)

        def show(step: int, metrics: dict) -> None:
            progress.update(bar, completed=step, description=f"stage {metrics['stage']} loss {metrics['loss']:.3f}")
            if "acceptance_by_depth" in metrics:
                console.print(f"step {step}: acceptance by depth {metrics['acceptance_by_depth']}")
            check_interrupt(trainer.save)

        trainer.run(show)
