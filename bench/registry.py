"""The verification ops' benchmark cases: one list for pytest-benchmark and for `python -m bench`.

A case names its peers, ours first; `check` raises where a peer disagrees, and runs before any time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bench.timing import event_times, host_times, row_of

SHAPES = [(49152, 16), (49152, 60), (128256, 16), (128256, 60)]
"""(vocabulary, rows): SmolLM2's and Llama 3's vocabulary, a small tree and the default one."""


@dataclass
class Case:
    """One comparison: functions without arguments by name, ours under "beagle"; `bounds` are not peers of it.

    `work` is how many bytes or floating point operations one call has to do, whoever does it.
    """

    name: str
    peers: dict[str, Callable]
    check: Callable[[], None]
    bounds: tuple[str, ...] = ()
    rounds: int = 15
    device: str = "cpu"
    work: dict[str, float] = field(default_factory=dict)
    data: str = "normal random"
    times: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Check, then time all peers: by the GPU's clock there, in turns by the host's on the CPU."""
        self.times = {}
        self.check()
        if self.device == "cuda":
            self.times = {name: event_times(peer, [()]) for name, peer in self.peers.items()}
        else:
            self.times = host_times(self.peers, self.rounds)

    def rows(self) -> list[dict]:
        """One result a peer."""
        return [
            row_of(times, self.device, self.work, group=self.name, peer=peer, bound=peer in self.bounds, data=self.data)
            for peer, times in self.times.items()
        ]


def lines(rows: list[dict]) -> Iterator[str]:
    """One line a row, ours first: 20, 50 and 80 percentiles in microseconds, and how many times ours is faster."""
    for row in rows:
        peer, *times = row["peer"], *(row[p] * 1e6 for p in ("p20", "p50", "p80"))
        kind = "" if peer == "beagle" else f"{row['p50'] / rows[0]['p50']:8.2f}x"
        label = f"{peer} (bound)" if row.get("bound") else peer
        yield f"  {label:34}{times[0]:12.1f}{times[1]:12.1f}{times[2]:12.1f} us{kind}"


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


def drive(benchmark, case: Case, peer: str) -> None:
    """One peer of a case under pytest-benchmark."""
    case.check()
    benchmark.group = case.name
    benchmark(case.peers[peer])


def parameters(cases: list[Case]) -> list[tuple[Case, str]]:
    """(case, peer) pairs for pytest.mark.parametrize."""
    return [(case, peer) for case in cases for peer in case.peers]


def label(value) -> str:
    """A test id for a case or a peer."""
    return value.name if isinstance(value, Case) else str(value)
