"""Ctrl-C in long work: it takes effect where nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[Callable[..., None]]:
    """Inside the block the first Ctrl-C is noted, and raises KeyboardInterrupt where the function given is called,
    after what that is given to do; a second one raises at once. In other threads than the main one, which alone is
    interrupted, and where Ctrl-C is ignored, as under nohup, nothing changes."""
    asked = False

    def note(number, frame) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def check(first: Callable[[], object] = lambda: None) -> None:
        if asked:
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
