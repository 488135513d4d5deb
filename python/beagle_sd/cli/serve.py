"""`beagle-sd serve`: vLLM's server with a draft, which it becomes once all is checked."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from beagle_sd.cli.console import TargetName, clear_errors
from beagle_sd.models.loading import bundled_folder
from beagle_sd.vllm.serve import server_command


def serve(
    context: typer.Context,
    target: TargetName = "smollm2-135m",
    draft: Annotated[
        str | None, typer.Option(help="A folder or hub name; default: the draft bundled for the target.")
    ] = None,
    num_speculative_tokens: Annotated[int, typer.Option(help="Tokens drafted a round, in a chain.")] = 4,
    coupled: Annotated[bool, typer.Option(help="Let requests sample by noise that the draft knows, too.")] = False,
) -> None:
    """Serve a target and its draft with vLLM, OpenAI-compatible. All other options are vLLM's own: --port,
    --max-model-len, --tensor-parallel-size."""
    with clear_errors():
        command = server_command(target, draft or bundled_folder(target), num_speculative_tokens, coupled, context.args)
        sys.stdout.flush()
        os.execv(command[0], command)
