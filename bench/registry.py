"""What a benchmark is: one list of cases a file, for pytest-benchmark and for `python -m bench`.

A file's `cases(device, size)` yields its cases. A case names its peers, ours first; nothing is timed before its result
was compared with the truth, and what is wrong gets no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.timing import device_times, host_times, row_of

SIZES = {
    "tiny": "seconds for all; what the tests and a dry run use",
    "small": "what a CPU is measured with",
    "full": "what a GPU is measured with",
    "scaling": "the shapes that the CPU's plots need",
}
SHAPES = {
    "tiny": [(500, 9)],
    "small": [(49152, 16), (49152, 60), (128256, 16), (128256, 60)],
    "scaling": [(2**n, 16) for n in range(12, 19)] + [(49152, nodes) for nodes in (1, 4, 64)],
}
"""(vocabulary, rows): SmolLM2's and Llama 3's vocabulary, a small tree and the default one."""
DTYPES = {
    "tiny": (torch.float32,),
    "small": (torch.float32, torch.bfloat16),
    "full": (torch.bfloat16,),
    "scaling": (torch.float32,),
}
"""The logits' types."""


@dataclass
class Case:
    """One comparison: functions by name, ours, "beagle", first; a string in place of a function is the reason why
    that peer is left out.

    Each is called with one of `inputs`, going round. `check` raises where ours is wrong: the whole case is refused.
    `check_peer` raises where the peer it is given is: that one is refused. `bounds` are no peers: they do less, and
    mark what the machine gives. `work` is how many bytes or floating point operations one call has to do, whoever
    does it. `series`, the op, and `at`, its sizes by name, are what the plots draw the case by. clock "device" is the
    GPU's own where there is one; functions of a "self-timed" case return their seconds. `notes`, called after the run,
    adds to a peer's row.
    """

    name: str
    peers: Mapping[str, Callable | str]
    check: Callable[[], None]
    bounds: tuple[str, ...] = ()
    rounds: int = 15
    device: str = "cpu"
    work: dict[str, float] = field(default_factory=dict)
    data: str = "normal random"
    inputs: Sequence[tuple] = ((),)
    check_peer: Callable[[str], None] = lambda name: None
    series: str = ""
    at: dict[str, object] = field(default_factory=dict)
    clock: str = "device"
    notes: Callable[[str], dict] = lambda name: {}

    def rows(self) -> Iterator[dict]:
        """Check, then a row a peer, ours first; one with the reason where it has no number.

        On a GPU each is timed by itself, and its row is there before the next one begins; on the CPU all in turns.
        """
        self.check()
        names = list(self.peers)
        ours = None
        for together in [[name] for name in names] if self.device == "cuda" else [names]:
            for row in self._timed(together):
                ours = ours or row.get("clock")
                # a ratio of two clocks says so
                yield row | ({"clock of ours": ours} if row.get("clock", ours) != ours else {})

    def _timed(self, names: list[str]) -> Iterator[dict]:
        """The rows of these peers. One that fails leaves the others their numbers; ours takes them with it."""
        ready: dict[str, Callable] = {}
        reasons: dict[str, dict] = {}
        for name in names:
            peer = self.peers[name]
            if isinstance(peer, str):
                reasons[name] = {"skipped": peer}
                continue
            with self._refusing(name, reasons):
                if name != "beagle":
                    self.check_peer(name)
                ready[name] = peer
        found: dict[str, tuple[torch.Tensor, str]] = {}
        if self.device == "cuda" and self.clock == "device":
            for name, peer in ready.items():
                with self._refusing(name, reasons):
                    found[name] = device_times(peer, self.inputs)
        elif ready:
            with self._refusing(names[0], reasons):
                times = host_times(ready, self.rounds, self.inputs, self.device, self_timed=self.clock == "self-timed")
                found = {name: (of_it, "host") for name, of_it in times.items()}
        for name in names:
            row = {}
            if name in found:
                with self._refusing(name, reasons):
                    row = self._row(name, *found[name])
            yield row or {"group": self.name, "peer": name, **reasons[name]}

    def _row(self, name: str, times: torch.Tensor, clock: str) -> dict:
        labels = {
            "peer": name,
            "bound": name in self.bounds,
            "clock": clock,
            "group": self.name,
            "series": self.series,
            "at": self.at,
            "data": self.data,
        }
        return row_of(times, self.device, self.work, **labels) | self.notes(name)

    @contextmanager
    def _refusing(self, name: str, reasons: dict[str, dict]) -> Iterator[None]:
        """An error inside is a peer's reason; ours is raised."""
        try:
            yield
        except Exception as error:
            if name == "beagle":
                raise
            reasons[name] = {"refused": f"{type(error).__name__}: {error}"}


def is_ours(peer: str) -> bool:
    """Whether a peer's name is one of our own: "beagle", or "beagle plain"."""
    return peer.split()[0] == "beagle"


def line(row: dict, ours: dict) -> str:
    """20, 50 and 80 percentiles in microseconds, how many times ours is faster, memory, and how it was timed where
    that is not as ours was."""
    if "p50" not in row:
        why = next(f"{kind}: {row[kind]}" for kind in ("skipped", "refused") if kind in row)
        return f"  {row['peer']:34}{' '.join(why.split())[:200]}"
    label = f"{row['peer']} (bound)" if row.get("bound") else row["peer"]
    times = "".join(f"{row[p] * 1e6:12.1f}" for p in ("p20", "p50", "p80"))
    ratio = "" if row is ours else f"{row['p50'] / ours['p50']:8.2f}x"
    memory = f", {row['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in row else ""
    clock = f", by {row['clock']}" if row is ours or "clock of ours" in row else ""
    return f"  {label:34}{times} us{ratio}{memory}{clock}"


def measured(case: Case) -> Iterator[dict]:
    """A case's rows as they are there, or the error that it has instead; printed too."""
    print(f"\n{case.name}, {case.data}", flush=True)
    ours: dict = {}
    try:
        for row in case.rows():
            ours = ours or row
            print(line(row, ours), flush=True)
            yield row
    except Exception as error:  # one case's failure leaves the others their numbers
        print(f"  refused: {type(error).__name__}: {error}", flush=True)
        yield {"group": case.name, "peer": "beagle", "error": f"{type(error).__name__}: {error}"}


def moved(value, device: str):
    """A tensor, or a tuple of them, on the device; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        fields = [moved(one, device) for one in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return value


def same_as_truth(op: Callable, *args) -> None:
    """Raise unless op(*args) equals the truth, exactly: the reference's, or on a GPU the host executor's."""
    on_host = moved(args, "cpu")
    backend = "reference" if all(a is b for a, b in zip(on_host, args) if isinstance(a, torch.Tensor)) else "auto"
    for have, want in zip(op(*args), op(*on_host, backend=backend)):
        assert not isinstance(want, torch.Tensor) or torch.equal(have.cpu(), want), f"{op.__name__} is wrong"


def assert_near(name: str, found: torch.Tensor, truth: torch.Tensor, most: float) -> None:
    """Raise unless every element is within `most` of the truth, NaN never; the message names what is wrong."""
    error = (found.double() - truth.double()).abs().max().item() if found.numel() else 0.0
    assert found.shape == truth.shape and error <= most, f"{name} is wrong: off by {error:.3g}, allowed {most:.3g}"


def drive(benchmark, case: Case, peer: str) -> None:
    """One peer of a case under pytest-benchmark: it gets no number before it was compared with the truth."""
    import pytest  # not above: only pytest-benchmark comes here

    run = case.peers[peer]
    if isinstance(run, str):
        pytest.skip(run)
    case.check()
    case.check_peer(peer)
    benchmark.group = case.name
    turn = iter(range(10**9))
    benchmark(lambda: run(*case.inputs[next(turn) % len(case.inputs)]))
    benchmark.extra_info.update(case.notes(peer), peer=peer, data=case.data, bound=peer in case.bounds, **case.work)


def parameters(cases: list[Case]) -> list[tuple[Case, str]]:
    """(case, peer) pairs for pytest.mark.parametrize."""
    return [(case, peer) for case in cases for peer in case.peers]


def label(value) -> str:
    """A test id for a case or a peer."""
    return value.name if isinstance(value, Case) else str(value)
