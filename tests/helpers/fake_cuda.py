"""Streams, captures and memory pools as torch.cuda and its allocator keep them, for a machine without CUDA."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch


class FakeCuda:
    """Takes torch.cuda's place by `monkeypatch`; `torch.cuda.graph` and `torch.cuda.stream` stay the real ones.

    stream: the current one. capturing: the graph being captured; valid: False from what it cannot hold until it ends;
    begins: whether a capture can be begun. pools: what captures were given, in order; recording: those that the
    allocator serves captures from; released: those it was told to let go.
    """

    def __init__(self, monkeypatch):
        self.stream = self.default = self.new_stream()
        self.capturing, self.valid, self.begins = None, True, True
        self.recording: list = []
        self.pools: list = []
        self.released: list = []
        self.handles = 0
        fakes = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device": contextlib.nullcontext,
            "current_stream": lambda _=None: self.stream,
            "set_stream": self.set_stream,
            "Stream": self.new_stream,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": self.new_pool,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name, private in (
            ("_cuda_endAllocateToPool", self.end_allocation),
            ("_cuda_releasePool", self.release),
            ("_host_emptyCache", lambda: None),
        ):
            monkeypatch.setattr(torch._C, name, private, raising=False)

    def new_stream(self, device=0) -> SimpleNamespace:
        where = torch.device("cpu")  # where `device=stream.device` makes tensors
        return SimpleNamespace(device=where, device_index=0, wait_stream=lambda other: None)

    def set_stream(self, stream) -> None:
        self.stream = stream

    def new_pool(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    def end_allocation(self, device: int, pool) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool) -> None:
        self.released.append(pool)

    def break_capture(self) -> None:
        """Do what no capture can hold, as reading a tensor on the host."""
        if self.capturing is not None:
            self.valid = False
            raise RuntimeError("operation not permitted when stream is capturing")


class FakeGraph:
    def __init__(self, cuda: FakeCuda):
        self.cuda, self.pool, self.replays = cuda, None, 0

    def capture_begin(self, pool, **options) -> None:
        assert self.cuda.stream is not self.cuda.default, "captured on the default stream"
        if pool in self.cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.cuda.pools.append(pool)
        self.cuda.recording.append(pool)
        if not self.cuda.begins:
            raise RuntimeError("cudaStreamBeginCapture failed")
        self.pool, self.cuda.capturing = pool, self

    def capture_end(self) -> None:
        self.cuda.capturing = None
        if not self.cuda.valid:
            self.cuda.valid = True
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.recording.remove(self.pool)

    def replay(self) -> None:
        self.replays += 1
