"""The clocks of the benchmarks, what a row holds, and the machine's own limits."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch

from bench.environment import device_name, versions

WARM_UP = 3
SHORT = 300e-6
"""Seconds on a GPU under which an op's launches and checks on the host may be what its events measure."""
SLEEPS = (2**20, 2**22, 2**24, 2**26)
"""Cycles of the GPU's clock, from half a millisecond, that a call is enqueued behind."""

Launch = Callable[[], object]


def device_times(run: Callable, inputs: Sequence[tuple], seconds: float = 0.5) -> tuple[torch.Tensor, str]:
    """Seconds on the GPU's clock of each run(*inputs[i]), i going round, 10 to 100 of them, and by which clock.

    "events" stand around the call. Where it is short, or the host takes half as long to enqueue it, that would measure
    the host; then the call on each input is captured and it is "graph replay" that the events stand around. What
    cannot be captured is enqueued "behind sleep", so that it is all there when its time begins. A call that itself
    waits for the GPU, as a walk on the host does, can be neither: its events hold the host's work, and so does its use.
    """
    calls: Sequence[Launch] = [partial(run, *one) for one in inputs]
    flush = flusher()
    stream, before = _side_stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    # one stream for all: the gradients of an output are computed, and so captured, on the stream that it was made on
    with torch.cuda.stream(stream):
        _recorded(calls, flush, WARM_UP * len(calls))
        once = _recorded(calls, flush, WARM_UP).median().item()
        calls, flush, clock = _without_host(calls, flush, once)
        times = _recorded(calls, flush, _count(once, seconds))
    before.wait_stream(stream)
    return times, clock


def event_times(run: Callable, inputs: Sequence[tuple], seconds: float = 0.5) -> torch.Tensor:
    """As device_times, by events whatever the host does."""
    calls, flush = [partial(run, *one) for one in inputs], flusher()
    _recorded(calls, flush, WARM_UP * len(calls))
    once = _recorded(calls, flush, WARM_UP).median().item()
    return _recorded(calls, flush, _count(once, seconds))


def flusher() -> Launch:
    """Reads a buffer of four times the L2 cache: no call finds its inputs there, and the host gets time to enqueue."""
    device = torch.device("cuda")
    return torch.zeros(max(torch.cuda.get_device_properties(device).L2_cache_size, 2**24), device=device).sum


def _count(once: float, seconds: float) -> int:
    return int(min(100, max(10, seconds / max(once, 1e-6))))


@cache
def _side_stream() -> torch.cuda.Stream:
    """The one that all calls of a process are timed on: a graph cannot be captured on the default one."""
    return torch.cuda.Stream()


def _recorded(calls: Sequence[Launch], flush: Launch, count: int) -> torch.Tensor:
    """Seconds between events around `count` of the calls, each after a flush."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for number, (start, end) in enumerate(events):
        flush()
        start.record()
        calls[number % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return torch.tensor([start.elapsed_time(end) / 1e3 for start, end in events], dtype=torch.float64)


def _without_host(calls: Sequence[Launch], flush: Launch, once: float) -> tuple[Sequence[Launch], Launch, str]:
    """(calls, flush, clock) that time a call of `once` seconds, by events, without the host's part in it."""
    if once >= SHORT and once >= 2 * _host_seconds(calls[0], flush):
        return calls, flush, "events"
    cycles = _sleep_for(calls, flush)
    if cycles is None:
        return calls, flush, "events"
    try:
        return captured(calls), flush, "graph replay"
    except Exception as error:
        print(f"  not captured: {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)

    def behind() -> None:
        flush()
        torch.cuda._sleep(cycles)

    return calls, behind, "behind sleep"


def _host_seconds(call: Launch, flush: Launch) -> float:
    """What the host takes to enqueue a call."""
    taken = []
    for _ in range(WARM_UP):
        flush()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return sorted(taken)[WARM_UP // 2]


def _sleep_for(calls: Sequence[Launch], flush: Launch) -> int | None:
    """Cycles behind which the host has enqueued any of the calls with time to spare, None where it waits for them."""
    for cycles in SLEEPS:
        late = False
        for call in calls:
            start = torch.cuda.Event(enable_timing=True)
            flush()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            late |= start.query()
            torch.cuda.synchronize()
        if not late:
            return 2 * cycles
    return None


def captured(calls: Sequence[Launch]) -> Sequence[Launch]:
    """A replay of each call, captured on the current stream.

    Raises what the call or the capture raises; stream, allocator and generator are then as they were.
    """
    found = []
    for call in calls:
        graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "The CUDA Graph is empty")
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    call()
        except BaseException:
            # not above: transformers imports Triton, which tuning on a CPU first asks for its interpreter
            from beagle_sd.decoding.graph import recover

            torch.cuda.set_stream(stream)
            recover(graph, pool, stream)
            raise
        found.append(graph.replay)
    return found


def host_times(
    runs: dict[str, Callable],
    rounds: int,
    inputs: Sequence[tuple] = ((),),
    device: str = "cpu",
    self_timed: bool = False,
) -> dict[str, torch.Tensor]:
    """Seconds on the host's clock of each run, taken in turns, so that what else the machine does hits all alike.

    self_timed: each run returns its seconds itself.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + WARM_UP - 1 if not self_timed else rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            found = run(*inputs[i % len(inputs)])
            if device == "cuda":
                torch.cuda.synchronize()
            if self_timed:
                taken[name].append(found)
            elif i >= WARM_UP - 1:
                taken[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in taken.items()}


def row_of(times: torch.Tensor, device: str, work: dict[str, float], **labels) -> dict:
    """A result: percentiles in seconds, the amounts of `work` a call and a second, and the environment."""
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=times.dtype)).tolist()
    rates = {f"{unit}/s": amount / p50 for unit, amount in work.items()}
    found = {"p20": p20, "p50": p50, "p80": p80, **work, **rates}
    return {**found, "device": device_name(device), **labels, **versions("torch", "beagle_kernels")}


def limits() -> dict[str, float]:
    """This GPU's copy bandwidth (1 GiB read and written) and bf16 matmul rate (8192^3), medians."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = event_times(target.copy_, [(source,)]).median().item()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = event_times(torch.matmul, [(a, b)]).median().item()
    return {"byte/s": 2.0 * source.numel() * 4 / copy, "flop/s": 2.0 * 8192**3 / product}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(limits()) + "\n")
