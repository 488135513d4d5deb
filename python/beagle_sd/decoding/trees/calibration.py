"""What a round costs on this machine, measured once and kept: the adaptive tree weighs it against acceptance."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import beagle_kernels
from beagle_kernels.machine import cores, processor
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.adaptive import AdaptiveTree, Costs
from beagle_sd.decoding.trees.tree import PLAIN, TreeShape
from beagle_sd.files import cache_folder, write_json
from beagle_sd.models import smollm2
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import bundled_folder, measured_acceptance
from beagle_sd.models.target import Target

_PASSES = 3
_ROUNDS = 8
"""Of each shape in a pass: shapes take turns, so that what else the machine does hits all alike."""
_STEADY = 2.0
"""The most scatter of costs that are kept: 1.3 to 1.4 was seen on two quiet cores of a shared host."""


def adaptive_tree(
    target: PreTrainedModel,
    draft: BeagleDraft,
    *,
    measured: Mapping[TreeShape, float] | None = None,
    calibrate: bool = False,
) -> AdaptiveTree:
    """The tree for `generate(..., tree=...)` on this machine: costs from the cache, or measured on first use (some
    seconds) and kept there; `calibrate` measures them anew.

    measured: tokens a round by shape; None takes the acceptance.json beside the draft's weights or, without one, the
    bundled draft's as a first guess, which the text soon corrects; of a target that verifies chains only, the chains.
    """
    if measured is None:
        chains = bool(Target(target).chains_only)
        own = Path(draft.name_or_path) if draft.name_or_path else None
        measured = (_greedy(own, chains) if own else {}) or _greedy(bundled_folder(smollm2.NAME), chains)
    return AdaptiveTree(calibrated_costs(target, draft, measured, anew=calibrate), measured)


def _greedy(folder: Path, chains: bool) -> dict[TreeShape, float]:
    """Tokens a round by shape as a draft's folder has them, of chains alone if asked."""
    rows = [row for row in measured_acceptance(folder) if row["temperature"] == 0.0]
    names = tuple(vars(PLAIN))
    found = {TreeShape(*(row.get(name, 0) for name in names)): row["tokens_per_round"] for row in rows}
    return {shape: tokens for shape, tokens in found.items() if shape.branch == 1 or not chains}


def calibrated_costs(
    target: PreTrainedModel,
    draft: BeagleDraft,
    shapes: Iterable[TreeShape],
    *,
    anew: bool = False,
    folder: str | Path | None = None,
) -> Costs:
    """The costs of these shapes on this machine, from `folder` (None: `calibration_folder()`) or measured, and kept.

    A file belongs to one machine, thread count, target, draft and set of versions; one that cannot be read is written
    anew, as is any with `anew`. Where nothing can be written, or the machine was too busy for the costs to be worth
    keeping, a warning says so, and they serve this process only.
    """
    shapes = list(dict.fromkeys(shapes))
    key = _key(target, draft)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder or calibration_folder()) / f"{name}.json"
    costs = None if anew else _read(path, key)
    if costs is not None and all(shape in costs.draft for shape in shapes if shape.num_nodes > 1):
        return costs
    costs = measure_costs(target, draft, [*(costs.draft if costs else ()), *shapes])
    if costs.scatter > _STEADY:
        warnings.warn(
            f"the machine is busy: the same rounds took up to {costs.scatter:.1f} times as long in one pass "
            "as in another; their costs serve this process and are measured anew by the next",
            stacklevel=2,
        )
        return costs
    try:
        write_json(path, _kept(key, costs))
    except OSError as error:
        warnings.warn(
            f"measured costs could not be kept in {path} ({error}); they serve this process, and BEAGLE_CACHE names "
            "another folder",
            stacklevel=2,
        )
    return costs


def calibration_folder() -> Path:
    """Where measured costs are kept, one JSON a machine, target and draft; it may not exist yet."""
    return cache_folder() / "calibration"


def measure_costs(
    target: PreTrainedModel, draft: BeagleDraft, shapes: Iterable[TreeShape], *, prefix: int = 64
) -> Costs:
    """Decode a little with each shape after `prefix` random tokens, in turns: medians of whole rounds, some seconds on
    a CPU. A round's drafting is its share of the loop's own report (0 where a graph's replay has no parts), the rest
    counts as verification."""
    shapes = [PLAIN, *(shape for shape in dict.fromkeys(shapes) if shape.num_nodes > 1)]
    vocabulary = target.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prefix), generator=torch.Generator().manual_seed(0)).to(target.device)
    rounds: dict[TreeShape, list[list[float]]] = {shape: [] for shape in shapes}
    drafting: dict[TreeShape, list[float]] = {shape: [] for shape in shapes}
    for _ in range(_PASSES):
        for shape in shapes:
            clock = _Clock()
            report = generate(
                target,
                draft,
                ids,
                max_new_tokens=_ROUNDS + 2,
                eos_token_id=[],
                pad_token_id=0,
                streamer=clock,
                tree=shape,
            ).report
            rounds[shape].append(clock.milliseconds)
            phases = {name: took for name, took in report.seconds.items() if name not in ("prefill", "capture")}
            drafting[shape].append(phases.get("draft", 0.0) / sum(phases.values()))
    whole = {shape: statistics.median(sum(passes, [])) for shape, passes in rounds.items()}
    scatter = max(max(medians) / min(medians) for medians in (list(map(statistics.median, p)) for p in rounds.values()))
    rest: dict[int, list[float]] = {1: [whole[PLAIN]]}
    for shape in shapes[1:]:
        rest.setdefault(shape.num_nodes, []).append(whole[shape] * (1.0 - statistics.median(drafting[shape])))
    verify = {size: min(taken) for size, taken in sorted(rest.items())}
    return Costs(verify, {shape: whole[shape] - verify[shape.num_nodes] for shape in shapes[1:]}, scatter)


class _Clock(BaseStreamer):
    """Notes when each round's tokens come."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def milliseconds(self) -> list[float]:
        """Of each round but the first, which warms up; before it come the prompt and the prefill's token."""
        return [1e3 * (after - before) for before, after in zip(self.times[2:], self.times[3:])]


def _key(target: PreTrainedModel, draft: BeagleDraft) -> dict:
    """All that a cost depends on."""
    config, wrapped = target.config.get_text_config(), Target(target)
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
    )
    of_the_draft = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "draft_vocab_size",
        "append_states",
        "window_keys",
    )
    on_gpu = target.device.type == "cuda"
    name = torch.cuda.get_device_name(target.device) if on_gpu else processor()
    return {
        "machine": {"name": name} if on_gpu else {"name": name, "cores": cores(), "threads": torch.get_num_threads()},
        "target": {
            "model_type": config.model_type,
            "dtype": str(target.dtype),
            "int8": wrapped.is_int8,
            "halved": wrapped.head.half is not None,
            **{name: getattr(config, name, None) for name in sizes},
        },
        "draft": {
            "dtype": str(draft.dtype),
            "int8": draft.is_int8,
            **{name: getattr(draft.config, name) for name in of_the_draft},
        },
        "versions": {
            "beagle_kernels": beagle_kernels.__version__,
            "built": _built(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _built() -> int | None:
    """When the extension was built, in seconds; None without one."""
    module = importlib.util.find_spec("beagle_kernels._C")
    return int(os.stat(module.origin).st_mtime) if module is not None and module.origin else None


def _read(path: Path, key: dict) -> Costs | None:
    """The costs of a file that is whole and of this key, else None."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        verify = {int(size): float(cost) for size, cost in kept["verify_ms"].items()}
        costs = Costs(verify, {TreeShape(*shape): float(cost) for *shape, cost in kept["draft_ms"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = all(cost > 0 for cost in verify.values()) and all(cost >= 0 for cost in costs.draft.values())
    whole = {1, *(shape.num_nodes for shape in costs.draft)} <= verify.keys()
    return costs if sound and whole else None


def _kept(key: dict, costs: Costs) -> dict:
    """What a file holds."""
    drafts = [[*vars(shape).values(), cost] for shape, cost in costs.draft.items()]
    return {"key": key, "verify_ms": costs.verify, "draft_ms": drafts}
