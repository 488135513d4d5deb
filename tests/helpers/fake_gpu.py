"""A GPU that only keeps time, on a clock of its own: calls take it seconds, and the host others to enqueue them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch

from beagle_sd.decoding import graph as rounds
from bench import timing

CYCLES = 2e9
"""A second."""
LAUNCH = 5e-6
"""What enqueuing anything takes the host."""
REFUSED = "operation not permitted when stream is capturing"


class FakeGpu:
    """Stands in for what bench.timing asks of torch.cuda; `now` is the host's time, `free` when the GPU is idle."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0
        self.capturing: list[float] | None = None
        self.slept = self.captures = self.undone = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                gpu.now += LAUNCH
                self.at = max(gpu.now, gpu.free)

            def query(self):
                return self.at <= gpu.now

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class CUDAGraph:
            def replay(self):
                gpu.work(sum(self.held), LAUNCH)

        @contextmanager
        def graph(graph, pool, stream):
            self.captures += 1
            self.capturing = graph.held = []
            try:
                yield
            finally:
                self.capturing = None

        class Stream:
            def wait_stream(self, other):
                pass

        stream = Stream()
        fakes = {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": Stream,
            "synchronize": self.wait,
            "current_stream": lambda: stream,
            "graph_pool_handle": lambda: (0, 1),
            "_sleep": self.sleep,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(timing, "flusher", lambda: lambda: self.work(70e-6, LAUNCH))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(rounds, "recover", self.undo)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        timing._side_stream.cache_clear()
        monkeypatch.setattr(timing, "_side_stream", lambda: stream)

    def work(self, seconds: float, host: float = 0.0) -> None:
        """Enqueue that much for the GPU, which takes the host `host`."""
        self.now += host
        if self.capturing is None:
            self.free = max(self.free, self.now) + seconds
        else:
            self.capturing.append(seconds)

    def wait(self) -> None:
        """The host waits for the GPU."""
        if self.capturing is not None:
            raise RuntimeError(REFUSED)
        self.now = max(self.now, self.free)

    def sleep(self, cycles: int) -> None:
        self.slept += 1
        self.work(cycles / CYCLES, LAUNCH)

    def undo(self, graph, pool, stream) -> None:
        self.undone += 1
