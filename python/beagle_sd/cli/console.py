"""What the commands share: options that mean the same everywhere, errors, waiting, progress, joined processes."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel
from transformers.utils import logging

from beagle_sd.cli.interrupt import raise_at_interrupt
from beagle_sd.data.rows import LeftOut
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.calibration import adaptive_tree
from beagle_sd.models import smollm2
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.trainer import TrainingStopped

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TargetName = Annotated[str, typer.Option("--target", help="Target model: smollm2-135m, a folder, or a hub name.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bf16 on a GPU, fp32 on a CPU.")]
Weights = Annotated[
    str, typer.Option(help="int8: linear layers in int8, on a CPU; floats: as they are; auto: in 16 bits too if exact.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")]
DraftFolder = Annotated[Path | None, typer.Option("--draft", help="Default: the draft bundled for the target.")]
Calibrate = Annotated[bool, typer.Option(help="Measure this machine's costs anew, instead of those kept.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k best tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Keep the smallest set of this mass; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the best; 0 is off.")]
Tree = Annotated[
    str | None, typer.Option(help="depth,branch,num_nodes, as 4,4,8; default: adapts to cost and acceptance.")
]
Seed = Annotated[int, typer.Option(help="Seed of sampling, of the data's order, or of the prompts.")]

console = Console()


@contextmanager
def clear_errors(after_interrupt: str = "") -> Iterator[None]:
    """Show what a user can mend as one line, and exit with 1, or with 130 after Ctrl-C; anything else is a bug and
    keeps its traceback. transformers' own progress bars stay off."""
    logging.disable_progress_bar()
    raise_at_interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may have what the terminal's encoding has not
    try:
        yield
    except KeyboardInterrupt as error:
        console.print(f"\nstopped{escape(after_interrupt)}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from error
    except BrokenPipeError:
        raise
    except (ValueError, OSError, TrainingStopped) as error:
        print_error(error)
        raise typer.Exit(1) from error


def print_error(error: Exception) -> None:
    """What a user can mend, as one line."""
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def joined_processes(device: str | None) -> tuple[PartialState, Console]:
    """The processes of `torchrun` or `accelerate launch`, this one alone without; a quiet console for all but one."""
    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return processes, console if processes.is_main_process else Console(quiet=True)


def measured_tree(target: PreTrainedModel, draft: BeagleDraft, calibrate: bool) -> AdaptiveTree:
    """What adapts by this machine's costs, measured now if they are not known."""
    with waiting(console, "measuring what rounds cost on this machine: some seconds, the first time"):
        return adaptive_tree(target, draft, calibrate=calibrate)


def loading(console: Console, target_name: str) -> AbstractContextManager:
    """`waiting` for a target, by name."""
    if target_name == smollm2.NAME and not smollm2.is_converted(smollm2.converted_folder()):
        return waiting(console, f"converting {target_name} for transformers: once, about 15 seconds")
    return waiting(console, f"loading {target_name}")


def waiting(console: Console, what: str) -> AbstractContextManager:
    """Say on stderr what is waited for, until it is there; nothing where stderr is no terminal."""
    return Console(stderr=True, quiet=console.quiet).status(escape(what))


def progress_bar(console: Console) -> Progress:
    """A bar with what is said beside it."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def print_left_out(console: Console, left: LeftOut) -> None:
    """Say how many rows were not used, and why."""
    for line in left.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that --dtype names; None for auto."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]
