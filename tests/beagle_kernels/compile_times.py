"""What the Triton tests for a GPU compile, without one: python -O tests/beagle_kernels/compile_times.py [WORD ...]

Every such test, or those that have one of the words in their name, launches what it launches on an sm_90; nothing runs,
and no result is looked at, for which -O drops the asserts. Prints, a line a test, the kernels it needs and the seconds
that compiling them took here; last, how long the busiest of WORKERS would compile.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent.parent / folder) for folder in (".", "python", "tests/helpers")
]

import fault_cases  # noqa: E402
import torch  # noqa: E402
import triton_cases  # noqa: E402
from test_triton_ops import ON_A_GPU  # noqa: E402
from triton import testing  # noqa: E402

from beagle_kernels.triton import configs  # noqa: E402
from beagle_kernels.triton.tune_block_attention import tune_block_attention  # noqa: E402
from bench.compiled import compiling_for  # noqa: E402

WORKERS = 14


def tests() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and work of each, in the order in which they are collected."""
    for op, check in fault_cases.CHECKS.items():
        yield f"hostile, {op}", partial(check, "cpu", 100, "triton")
    for one in ON_A_GPU:
        op, group, dtype = one.values
        yield one.id, partial(triton_cases.CHECKS[op][group], "cpu", dtype)
    q, k, v = (torch.zeros(1000, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    yield "tuning", partial(tune_block_attention, q, k, v, 5, torch.zeros(1, dtype=torch.int32))


def busiest(loads: list[float]) -> float:
    """The longest any worker takes, each test in order going to the one that is least busy."""
    workers = [0.0] * WORKERS
    for load in loads:
        workers[workers.index(min(workers))] += load
    return max(workers)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    seconds: dict[tuple[str, str], float] = {}
    alone, shared = [], []
    for name, work in tests():
        if words and not any(word in name for word in words):
            continue
        with compiling_for(90) as found:
            work()
        new = {(one.name, one.ptx): one.seconds for one in found if one.seconds is not None}
        seconds |= new
        needed = {(one.name, one.ptx) for one in found}
        alone.append(sum(seconds[one] for one in needed))
        shared.append(sum(new.values()))
        print(f"{len(needed):3} kernels {alone[-1]:6.1f} s, {len(new):3} of them new: {name}", flush=True)
    print(
        f"{len(seconds)} kernels in {sum(seconds.values()):.0f} s; of {WORKERS} workers the busiest "
        f"{busiest(shared):.0f} s; with nothing shared {sum(alone):.0f} s in all, the busiest {busiest(alone):.0f} s"
    )


if __name__ == "__main__":
    if __debug__:
        sys.exit("asserts are on: run it as python -O")
    with ExitStack() as stack:
        os.environ["TRITON_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(triton_cases.little_memory())
        for module, name, instead in (
            (torch.testing, "assert_close", lambda *args, **options: None),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (testing, "do_bench", lambda run, **options: (run(), 1.0)[1]),
            (configs, "_tuned", {}),
        ):
            stack.enter_context(mock.patch.object(module, name, instead))
        main(sys.argv[1:])
