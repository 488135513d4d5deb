"""Work in children of the test process, which need not import anything again."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Callable

import torch


def start(work: Callable[[], object]) -> int:
    """Begin `work` in a child; its process id."""
    assert torch.get_num_threads() == 1, "a child of a process with more threads hangs at its first parallel loop"
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(300)
        # makes the pool that a fork has lost anew; where two threads of a loader ask for it at once, one gets none
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int) -> int:
    """Wait for a child: its exit status, or less the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(work: Callable[[], object]) -> int:
    """`work` in a child, to its end, as `ended` gives it."""
    return ended(start(work))


def die(*args, **options) -> None:
    """As if killed from outside, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_ranks(processes: int, work: Callable[[], object]) -> list[int]:
    """`work` in processes that find each other as those of `torchrun` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranked(rank: int) -> None:
        from accelerate import PartialState

        os.environ.update(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",  # as torchrun sets it; else accelerate asks for threads that a fork has lost
            }
        )
        PartialState._reset_state()
        work()

    return [ended(child) for child in [start(lambda rank=rank: ranked(rank)) for rank in range(processes)]]
