"""What a failed capture leaves behind: nothing. With torch's own contexts over a CUDA that is not there."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda
from models import agreeable_target, small_draft
from round_cases import TREE, begun

from beagle_sd import GraphError
from beagle_sd.decoding import graph
from beagle_sd.decoding.graph import RoundGraph
from beagle_sd.decoding.report import Clock
from beagle_sd.decoding.rounds import play_round
from beagle_sd.decoding.trees.tree import TreeShape

DEVICE = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda(monkeypatch)
    aside = fake.new_stream()
    monkeypatch.setattr(graph, "_stream_aside", lambda index: aside)
    monkeypatch.setattr(graph, "_broken", [])
    return fake


def test_a_capture_runs_on_its_own_stream_and_comes_back(cuda):
    seen = []
    made = RoundGraph(lambda: seen.append((cuda.stream, cuda.capturing)), DEVICE, (0, 7))
    assert len(seen) == RoundGraph.WARM_UP + 1 and all(stream is not cuda.default for stream, _ in seen)
    assert [capturing for _, capturing in seen] == [None] * RoundGraph.WARM_UP + [made.graph]
    assert cuda.stream is cuda.default and cuda.recording == [] and cuda.pools == [(0, 7)]
    made.replay()
    assert made.graph.replays == 1 and graph._broken == []


def test_a_capture_that_cuda_cannot_end_leaves_the_stream_and_the_allocator_as_they_were(cuda):
    with pytest.raises(GraphError, match="captured as a CUDA graph: operation not permitted.*allowed: graph=False"):
        RoundGraph(cuda.break_capture, DEVICE, (0, 7))
    assert cuda.stream is cuda.default and cuda.recording == [] and cuda.released == [(0, 7)]
    # the graph that the allocator of pinned memory asks is kept; one more capture has set the generator right
    assert len(graph._broken) == 1 and len(cuda.pools) == 2 and cuda.pools[1] != (0, 7)


def test_an_error_of_the_round_alone_needs_no_mending(cuda):
    def failing():
        if cuda.capturing is not None:
            raise ValueError("no such shape")

    with pytest.raises(GraphError, match="no such shape"):
        RoundGraph(failing, DEVICE, (0, 7))
    assert cuda.stream is cuda.default and cuda.recording == [] and cuda.released == graph._broken == []


def test_a_capture_that_does_not_begin(cuda):
    cuda.begins = False
    with pytest.raises(GraphError, match="cudaStreamBeginCapture failed"):
        RoundGraph(lambda: None, DEVICE, (0, 7))
    assert cuda.stream is cuda.default and (0, 7) not in cuda.recording


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_memory_and_interrupts_stay_what_they_are(cuda, error):
    def failing():
        if cuda.capturing is not None:
            cuda.valid = False
            raise error("enough")

    with pytest.raises(error, match="enough"):
        RoundGraph(failing, DEVICE, (0, 7))
    assert cuda.stream is cuda.default and cuda.recording == []


def test_a_second_failure_is_told_by_its_own_reason(cuda):
    """Tried again while the first is being handled, as a caller with another way may do."""
    with pytest.raises(GraphError, match="operation not permitted"):
        try:
            raise torch.OutOfMemoryError("of another time")
        except torch.OutOfMemoryError:
            RoundGraph(cuda.break_capture, DEVICE, (0, 7))


@torch.inference_mode()
def test_an_engine_tries_again_with_a_pool_of_its_own(cuda, monkeypatch):
    target = agreeable_target()
    draft = small_draft(target)
    engine = begun(target, draft, tree=TREE)
    engine.graph, engine._pool = True, cuda.new_pool()
    live, small, clock = engine.buffers.live.clone(), TreeShape(2, 1, 3), Clock(DEVICE)
    engine.play(small, clock)
    assert cuda.pools == [engine._pool]

    def breaking(*args):
        play_round(*args)
        cuda.break_capture()

    with monkeypatch.context() as patch, pytest.raises(GraphError):
        patch.setattr("beagle_sd.decoding.engine.play_round", breaking)
        engine.play(engine.shape, clock)
    assert torch.equal(engine.buffers.live, live) and set(engine._graphs) == {small}
    assert cuda.stream is cuda.default and cuda.recording == []
    used = set(cuda.pools)
    engine.play(engine.shape, clock)
    engine.play(small, clock)
    assert cuda.pools[-1] not in used and set(engine._graphs) == {small, engine.shape}
    assert engine._graphs[small].graph.replays == 2
