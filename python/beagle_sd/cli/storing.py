"""Sequences stored as they come, with a progress bar and Ctrl-C between them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from rich.console import Console

from beagle_sd.cli.console import progress_bar
from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data import shards


class Writer(Protocol):
    """A `shards.ShardWriter`, or what keeps sequences elsewhere in the same way."""

    def add(self, sequence: shards.Sequence) -> None: ...
    def flush(self) -> None: ...


def store(
    console: Console, sequences: Iterable[shards.Sequence], writer: Writer, total: int, what: str = "prepare"
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
