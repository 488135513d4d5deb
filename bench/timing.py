"""What the op benchmarks share: the clock, rotated inputs, what a row says of itself, and the machine's own limits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch

import beagle_kernels

ON_GPU = "full"
"""The set of shapes sized for a GPU; "small" runs anywhere."""
WARM_UP = 3


def device_for(size: str) -> torch.device:
    """Full shapes run on a GPU and are skipped without one."""
    import pytest

    if size == ON_GPU and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda" if size == ON_GPU else "cpu")


def event_times(run: Callable, inputs: Sequence[tuple], seconds: float = 0.5) -> torch.Tensor:
    """Seconds on the GPU's clock of each run(*inputs[i]), i going round, for about `seconds`, 10 to 100 of them.

    Before each one a buffer of four times the L2 cache is read: no call finds its inputs there, and the read lasts
    long enough for the host to enqueue what follows. Work of a peer on the host, as a walk in Python, is in its time.
    """
    device = torch.device("cuda")
    cold = torch.zeros(max(torch.cuda.get_device_properties(device).L2_cache_size, 2**24), device=device)
    turn = itertools.cycle(inputs)

    def timed_calls(count: int) -> torch.Tensor:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for start, end in events:
            cold.sum()
            start.record()
            run(*next(turn))
            end.record()
        torch.cuda.synchronize()
        return torch.tensor([start.elapsed_time(end) / 1e3 for start, end in events], dtype=torch.float64)

    timed_calls(WARM_UP * len(inputs))
    once = timed_calls(WARM_UP).median().item()
    return timed_calls(int(min(100, max(10, seconds / max(once, 1e-6)))))


def host_times(
    runs: dict[str, Callable], rounds: int, inputs: Sequence[tuple] = ((),), device: str = "cpu", own: bool = False
) -> dict[str, torch.Tensor]:
    """Seconds on the host's clock of each run, taken in turns, so that what else the machine does hits all alike.

    own: each run returns its seconds itself.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + WARM_UP - 1 if not own else rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            found = run(*inputs[i % len(inputs)])
            if device == "cuda":
                torch.cuda.synchronize()
            if own:
                taken[name].append(found)
            elif i >= WARM_UP - 1:
                taken[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in taken.items()}


def row_of(times: torch.Tensor, device: str, work: dict[str, float], **labels) -> dict:
    """A result: percentiles in seconds, the amounts of `work` a call and a second, and the environment."""
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=times.dtype)).tolist()
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "beagle_kernels": beagle_kernels.__version__}
    rates = {f"{unit}/s": amount / p50 for unit, amount in work.items()}
    labels = {"data": "normal random", **labels}
    return {"p20": p20, "p50": p50, "p80": p80, **work, **rates, "device": name, **labels, **versions}


def timed(benchmark, run: Callable, inputs: Sequence[tuple], *, work: dict[str, float], **labels) -> None:
    """Time `run(*inputs[i])`, i going round, and add percentiles, rates and the environment to the row.

    `work` maps a unit's name to how many of it one call does: {"flop": 1e12} gives "flop/s". On a GPU the row is by
    the GPU's clock; pytest-benchmark's own columns hold one call by the host's and mean nothing.
    """
    device = inputs[0][0].device.type
    if device == "cuda":
        times = event_times(run, inputs)
        benchmark.pedantic(run, args=inputs[0], rounds=1)
    else:
        turn = itertools.cycle(inputs)
        for _ in inputs:
            run(*next(turn))
        benchmark(lambda: run(*next(turn)))
        if benchmark.stats is None:
            return
        times = torch.tensor(benchmark.stats.stats.data, dtype=torch.float64)
    benchmark.extra_info.update(row_of(times, device, work, **labels))


def limits() -> dict[str, float]:
    """This GPU's copy bandwidth (1 GiB read and written) and bf16 matmul rate (8192^3), medians."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = event_times(target.copy_, [(source,)]).median().item()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = event_times(torch.matmul, [(a, b)]).median().item()
    return {"byte/s": 2.0 * source.numel() * 4 / copy, "flop/s": 2.0 * 8192**3 / product}
