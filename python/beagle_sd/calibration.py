"""The tree that pays on this machine: measured costs of a round against measured acceptance."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from beagle_kernels import Sampling
from beagle_sd.attention import tree_attention_of
from beagle_sd.cache import causal
from beagle_sd.draft import BeagleDraft
from beagle_sd.drafting import DraftCache, TreeShape, propose
from beagle_sd.target import Target

_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """Milliseconds at batch 1: verify[n], the target's forward and head over n nodes; draft[shape], its levels."""

    verify: dict[int, float]
    draft: dict[TreeShape, float]

    def speedup(self, shape: TreeShape, tokens_per_round: float) -> float:
        """Over plain decoding: tokens a round / (cost of a round / cost of one plain forward)."""
        return tokens_per_round * self.verify[1] / (self.verify[shape.num_nodes] + self.draft[shape])


def measure_costs(
    target: PreTrainedModel, draft: BeagleDraft, shapes: Sequence[TreeShape], *, prefix: int = 256
) -> Costs:
    """Time a round's parts with `prefix` cached tokens: medians of a few runs, some seconds on a CPU."""
    wrapped = Target(target)
    sizes = sorted({1, *(shape.num_nodes for shape in shapes)})
    with torch.inference_mode(), tree_attention_of(target):
        verify = {size: _median(_forward(wrapped, size, prefix)) for size in sizes}
        drafting = {shape: _median(_drafting(draft, shape, prefix)) for shape in shapes}
    return Costs(verify, drafting)


def choose_shape(costs: Costs, acceptance: dict[TreeShape, float]) -> TreeShape:
    """The shape with the best speedup, plain decoding (one node) if none beats it."""
    best = max(acceptance, key=lambda shape: costs.speedup(shape, acceptance[shape]), default=None)
    if best is None or costs.speedup(best, acceptance[best]) <= 1.0:
        return TreeShape(1, 1, 1)
    return best


def _forward(target: Target, size: int, prefix: int) -> Callable[[], object]:
    cache = target.new_cache(1, prefix + size)
    cache.lengths.fill_(prefix)
    tokens = torch.randint(target.config.vocab_size, (1, size), device=target.device)
    depth = torch.arange(size, device=target.device)[None]
    mask = causal(1, size, target.device)
    return lambda: target.head(target.forward(tokens, depth, mask, cache))


def _drafting(draft: BeagleDraft, shape: TreeShape, prefix: int) -> Callable[[], object]:
    device = draft.head.device
    cache = DraftCache(draft, 1, prefix + 1 + shape.branch * shape.depth)
    lengths = torch.full((1,), prefix, dtype=torch.int32, device=device)
    root = torch.zeros(1, dtype=torch.int64, device=device)
    sampling = Sampling.of(1, device=device)
    return lambda: propose(draft, cache, lengths, root, sampling, shape.depth, shape.branch)


def _median(run: Callable[[], object]) -> float:
    """Milliseconds of one run, after one that warms up."""
    seconds = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])
