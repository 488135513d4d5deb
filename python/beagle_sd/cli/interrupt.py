"""Ctrl-C: while a command starts it ends it quietly, in long work it takes effect where nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def end_at_interrupt() -> None:
    """If this process is a command of this package, Ctrl-C ends it at once, without a traceback (a shell sees status
    130), until `raise_at_interrupt`. Nothing changes in a program that imports the package, and where Ctrl-C is
    ignored."""
    if is_command():
        _exchange(signal.default_int_handler, signal.SIG_DFL)


def is_command() -> bool:
    """Whether this process was started as `beagle-sd` or `python -m beagle_sd`, and is still importing it."""
    as_module = sys.argv[0] == "-m" and any(word.partition(".")[0] == "beagle_sd" for word in sys.orig_argv)
    return as_module or Path(sys.argv[0]).stem == "beagle-sd"


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`: from here on Ctrl-C raises KeyboardInterrupt, for what has something to keep."""
    _exchange(signal.SIG_DFL, signal.default_int_handler)


def _exchange(before, after) -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)


@contextmanager
def deferred_interrupt(quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Inside the block the first Ctrl-C is noted, and said unless `quiet`; it raises KeyboardInterrupt where the
    function given is called, after what that is given to do. A second one raises at once. In other threads than the
    main one, which alone is interrupted, and where Ctrl-C is ignored, as under nohup, nothing changes."""
    interrupted = False

    def note(number, frame) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)
        if not quiet:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def check(first: Callable[[], object] = lambda: None) -> None:
        if interrupted:
            first()
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
