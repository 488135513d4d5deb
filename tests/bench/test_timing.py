"""The clock that a benchmark's call is timed by is the one that leaves the host's work out, where there is one."""

from __future__ import annotations

import pytest
from fake_gpu import REFUSED, FakeGpu

from bench import timing
from bench.registry import Case, line, measured


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def median(run, inputs=((),)) -> tuple[float, str]:
    times, clock = timing.device_times(run, inputs)
    assert 10 <= len(times) <= 100
    return times.median().item(), clock


def test_a_short_call_is_timed_as_a_graph(gpu):
    """The host takes 200 us to enqueue 20 us of work: events would say 130, the flush hides the rest."""
    call = lambda: gpu.work(20e-6, 200e-6)  # noqa: E731
    assert timing.event_times(call, [()]).median().item() > 100e-6
    seconds, clock = median(call)
    assert clock == "graph replay" and seconds == pytest.approx(20e-6, abs=5e-6)


def test_each_input_has_a_graph_of_its_own(gpu):
    seen = []

    def call(seconds):
        seen.append(seconds)
        gpu.work(seconds, 50e-6)

    times, clock = timing.device_times(call, [(10e-6,), (40e-6,)])
    assert clock == "graph replay" and gpu.captures == 2 and len(times) == 100
    assert seen[-2:] == [10e-6, 40e-6], "the captures are the last calls"
    assert times[0::2].max() < 30e-6 < times[1::2].min()


def test_a_call_that_cannot_be_captured_is_enqueued_behind_a_sleep(gpu):
    def call():
        if gpu.capturing is not None:
            raise ValueError("not in a graph")
        gpu.work(20e-6, 900e-6)

    seconds, clock = median(call)
    assert clock == "behind sleep" and seconds == pytest.approx(20e-6, abs=5e-6) and gpu.captures == gpu.undone == 1


def test_a_capture_that_fails_falls_back(gpu, monkeypatch):
    def refused(calls):
        raise RuntimeError("no capture")

    monkeypatch.setattr(timing, "captured", refused)
    assert median(lambda: gpu.work(20e-6, 200e-6))[1] == "behind sleep"


def test_a_walk_on_the_host_is_timed_as_it_is_used(gpu):
    """It waits for the GPU in its midst: no capture is tried, which would leave the process spoiled."""

    def walk():
        gpu.work(20e-6, 50e-6)
        gpu.wait()
        gpu.work(10e-6, 300e-6)

    seconds, clock = median(walk)
    assert clock == "events" and seconds > 300e-6 and gpu.captures == 0


def test_a_long_call_is_timed_by_events(gpu):
    seconds, clock = median(lambda: gpu.work(2e-3, 300e-6))
    assert clock == "events" and seconds == pytest.approx(2e-3, rel=0.02) and gpu.captures == gpu.slept == 0


def test_many_launches_are_no_long_call(gpu):
    """1 ms of launches for 0.4 ms of work: the host is what events would measure."""

    def loop():
        for _ in range(100):
            gpu.work(4e-6, 10e-6)

    seconds, clock = median(loop)
    assert clock == "graph replay" and seconds == pytest.approx(4e-4, rel=0.05)


def test_an_error_in_the_call_is_raised_after_the_capture_is_undone(gpu):
    with pytest.raises(RuntimeError, match=REFUSED):
        timing.captured([gpu.wait])
    assert gpu.undone == 1 and gpu.capturing is None


def test_rows_of_two_clocks_say_so(gpu, monkeypatch, capsys):
    """On a GPU each peer's row is there before the next peer is tried, and one that fails costs its own alone."""
    monkeypatch.setattr("bench.registry.row_of", lambda times, device, work, **labels: labels | stats(times))

    def broken():
        raise RuntimeError("no such kernel")

    peers = {
        "beagle": lambda: gpu.work(20e-6, 200e-6),
        "on the host": lambda: (gpu.work(2e-5), gpu.wait()),
        "broken": broken,
        "alike": lambda: gpu.work(30e-6, 100e-6),
        "absent": "not installed",
    }
    rows = measured(Case("clocks", peers, lambda: None, device="cuda"))
    assert next(rows)["clock"] == "graph replay" and "on the host" not in capsys.readouterr().out
    other, refused, alike, absent = rows
    assert (other["clock"], other["clock of ours"]) == ("events", "graph replay")
    assert refused["refused"] == "RuntimeError: no such kernel" and absent["skipped"] == "not installed"
    assert alike["clock"] == "graph replay" and "clock of ours" not in alike
    assert line(other, alike).endswith("x, by events") and line(alike, other).endswith("x")


def stats(times) -> dict:
    return {name: times.median().item() for name in ("p20", "p50", "p80")}
