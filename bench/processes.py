"""Commands in process groups of their own: all their output in a file, ended in time, and with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE = 8.0
"""Seconds that a command gets after SIGINT to write what it has, before SIGKILL."""
GRACE_AT_END = 2.0
"""As many where this process itself is to end."""
TAIL = 3000
LARGEST = 2**19
"""Characters of a log that are kept: half from its start, half from its end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """A signal ends this process, with the exit status that a shell gives."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def end_on_signals() -> None:
    """From here on the first of SIGNALS raises Ended in the main thread, and the others are ignored.

    SIGINT too where a shell started us with it ignored, or the commands would inherit that and not hear it.
    """

    def end(number: int, frame: object) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise Ended(number)

    for one in SIGNALS:
        signal.signal(one, end)


@contextmanager
def started(command: list[str], log: Path | None = None, **variables: str) -> Iterator[subprocess.Popen]:
    """The command running in a process group of its own, `watched`."""
    # to a file: a worker that outlives the command would keep a pipe open
    with log.open("wb") if log else nullcontext() as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )
    with watched(process):
        yield process


@contextmanager
def watched(process: subprocess.Popen) -> Iterator[None]:
    """A process that leads a group of its own: the group is killed on leaving, and when this process is."""
    # a line ends the watcher; the end of its input, which even SIGKILL of this process brings about, the group
    watch = ["sh", "-c", 'read line || kill -s KILL -- "-$0"', str(process.pid)]
    watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        watcher.communicate(b"\n")


def interrupted(process: subprocess.Popen, grace: float) -> None:
    """SIGINT to the command's group, and `grace` seconds for what it has to write."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)


def run(command: list[str], seconds: float, log: Path, **variables: str) -> dict:
    """The command's status and seconds; the end of its output where it did not pass, all of it in `log`.

    One that takes longer than `seconds` gets SIGINT, and SIGKILL where it does not end then. "signal" is there where
    a signal ended this process meanwhile.
    """
    start = time.monotonic()
    ended: dict[str, int] = {}
    with started(command, log, **variables) as process:
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            interrupted(process, GRACE)
        except Ended as end:
            status, ended = f"stopped by {signal.Signals(end.number).name}", {"signal": end.number}
            interrupted(process, GRACE_AT_END)
    output = log.read_text(errors="replace")
    if len(output) > LARGEST:
        log.write_text(f"{output[: LARGEST // 2]}\n[...]\n{output[-LARGEST // 2 :]}")
    shown = {} if status == "passed" else {"output": output[-TAIL:]}
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **ended, **shown}
