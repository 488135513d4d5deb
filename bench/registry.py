"""What a benchmark is: one list of cases a file, for pytest-benchmark and for `python -m bench`.

A file's `cases(device, size)` yields its cases. A case names its peers, ours first; nothing is timed before its result
was compared with the truth, and what is wrong gets no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from bench.timing import event_times, host_times, row_of

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
    """One comparison: functions by name, ours under "beagle"; one that is a text is left out, for the reason it gives.

    Each is called with one of `inputs`, going round. `check` raises where ours is wrong: the whole case is refused.
    `check_peer` raises where the peer it is given is: that one is refused. `bounds` are no peers: they do less, and
    mark what the machine gives. `work` is how many bytes or floating point operations one call has to do, whoever
    does it. `series`, the op, and `at`, its sizes by name, place the case on the plots. clock "device" is the GPU's own
    where there is one; "own" has functions that return their seconds. `notes`, asked after the run, adds to a peer's
    row.
    """

    name: str
    peers: dict[str, Callable | str]
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
    times: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Check, then time all peers: by the GPU's clock there, in turns by the host's on the CPU."""
        self.times, self.refused = {}, {}
        self.check()
        ready: dict[str, Callable] = {}
        for name, peer in self.peers.items():
            if isinstance(peer, str):
                continue
            try:
                self.check_peer(name)
                ready[name] = peer
            except Exception as error:  # a peer that fails leaves the others their numbers
                self.refused[name] = f"{type(error).__name__}: {error}"
        if self.device == "cuda" and self.clock == "device":
            self.times = {name: event_times(peer, self.inputs) for name, peer in ready.items()}
        else:
            self.times = host_times(ready, self.rounds, self.inputs, self.device, own=self.clock == "own")

    def rows(self) -> list[dict]:
        """One result a peer, ours first; one with the reason where it has none."""
        labels = {"group": self.name, "series": self.series, "at": self.at, "data": self.data}
        rows = [
            row_of(times, self.device, self.work, peer=peer, bound=peer in self.bounds, **labels) | self.notes(peer)
            for peer, times in self.times.items()
        ]
        if rows:
            skipped = {peer: why for peer, why in self.peers.items() if isinstance(why, str)}
            for kind, reasons in (("skipped", skipped), ("refused", self.refused)):
                rows += [{"peer": peer, **labels, kind: why} for peer, why in reasons.items()]
        return rows


def lines(rows: list[dict]) -> Iterator[str]:
    """One line a row, ours first: 20, 50 and 80 percentiles in microseconds, and how many times ours is faster."""
    for row in rows:
        if "p50" not in row:
            why = next(f"{kind}: {row[kind]}" for kind in ("skipped", "refused") if kind in row)
            yield f"  {row['peer']:34}{' '.join(why.split())[:200]}"
            continue
        peer, *times = row["peer"], *(row[p] * 1e6 for p in ("p20", "p50", "p80"))
        kind = "" if peer == "beagle" else f"{row['p50'] / rows[0]['p50']:8.2f}x"
        label = f"{peer} (bound)" if row.get("bound") else peer
        yield f"  {label:34}{times[0]:12.1f}{times[1]:12.1f}{times[2]:12.1f} us{kind}"


def measured(case: Case) -> list[dict]:
    """A case's rows, or the error that it has instead; printed too."""
    print(f"\n{case.name}, {case.data}")
    try:
        case.run()
    except Exception as error:  # one case's failure leaves the others their numbers
        print(f"  refused: {type(error).__name__}: {error}", flush=True)
        return [{"group": case.name, "peer": "beagle", "error": f"{type(error).__name__}: {error}"}]
    rows = case.rows()
    print(*lines(rows), sep="\n", flush=True)
    return rows


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
