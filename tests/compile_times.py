"""What the Triton tests for a GPU compile, on a machine without one: python -O tests/compile_times.py [OP ...]

Every test of test_triton_ops.test_on_a_gpu launches what it launches on an sm_90, nothing runs, and no result is
looked at, for which -O drops the asserts. Prints, a line a test, the kernels it needs and the seconds that compiling
them took here; last, how busy the busiest of WORKERS would be.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "python")]

import torch  # noqa: E402
import triton_cases  # noqa: E402
from test_triton_ops import ON_A_GPU  # noqa: E402

from bench.compiled import compiling_for  # noqa: E402

WORKERS = 14


def busiest(loads: list[float]) -> float:
    """The longest any worker takes, each test in order going to the one that is least busy."""
    workers = [0.0] * WORKERS
    for load in loads:
        workers[workers.index(min(workers))] += load
    return max(workers)


def main(ops: list[str]) -> None:
    torch.set_num_threads(1)
    seconds: dict[tuple[str, str], float] = {}
    alone, shared = [], []
    for test in ON_A_GPU:
        op, group, dtype = test.values
        if ops and op not in ops:
            continue
        with compiling_for(90) as found, triton_cases.little_memory():
            triton_cases.CHECKS[op][group]("cpu", dtype)
        fresh = {(one.name, one.ptx): one.seconds for one in found if one.seconds is not None}
        seconds |= fresh
        needed = {(one.name, one.ptx) for one in found}
        alone.append(sum(seconds[one] for one in needed))
        shared.append(sum(fresh.values()))
        print(f"{len(needed):3} kernels {alone[-1]:6.1f} s, {len(fresh):3} of them new: {test.id}", flush=True)
    print(f"{len(seconds)} kernels in {sum(seconds.values()):.0f} s; of {WORKERS} workers the busiest "
          f"{busiest(shared):.0f} s; with nothing shared {sum(alone):.0f} s in all, the busiest {busiest(alone):.0f} s",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    if __debug__:
        sys.exit("asserts are on: run it as python -O")
    with tempfile.TemporaryDirectory() as cache, mock.patch.object(torch.testing, "assert_close", lambda *a, **b: None):
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1:])
