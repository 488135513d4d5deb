"""How the draft leans by the noise of coupled sampling, though vLLM computes its logits from states alone.

The position of each token to be drafted rides along in three columns behind the state, a byte in each, which is exact
in every dtype. The requests' settings are in the tensors of the `Coupled` processor of this process, of which an engine
has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from beagle_kernels import Sampling, top_candidates
from beagle_sd.vllm import COUPLED

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_BYTES = 3
_PREFIX = "beagle_"
_SETTINGS = {"seed": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float}


class Requests:
    """The settings of the requests in progress, by their slots, and the slots [max_num_reqs] of the last step's rows;
    always the same tensors, which a CUDA graph may read."""

    def __init__(self, slots: int, device: torch.device):
        self.sampling = Sampling.of(slots, device=device)
        self.slots = torch.zeros(slots, dtype=torch.int64, device=device)

    def of(self, slots: Tensor) -> Sampling:
        """The settings of rows whose slots [R] are given."""
        slots = slots.long().clamp(min=0)  # padding's are below 0
        return Sampling(*(setting[slots] for setting in self.sampling))


_requests: list[Requests] = []


def use(requests: Requests) -> None:
    """Lean by these from now on."""
    _requests[:] = [requests]


def is_coupled(vllm_config: VllmConfig) -> bool:
    """Whether the server was started with `Coupled`."""
    given = vllm_config.model_config.logits_processors or ()
    names = (one if isinstance(one, str) else f"{one.__module__}:{one.__qualname__}" for one in given)
    return COUPLED in names


def check(vllm_config: VllmConfig) -> None:
    """ValueError where `Coupled` was asked for and the draft would not lean."""
    speculative = vllm_config.speculative_config
    if is_coupled(vllm_config) and not speculative.use_local_argmax_reduction:
        raise ValueError(
            "use_local_argmax_reduction is False, where a draft cannot lean by the noise of coupled sampling; "
            f"allowed with {COUPLED}: true, in speculative_config"
        )
    if is_coupled(vllm_config) and vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError(
            "enable_batch_sharded_sampling is True, where each device knows a part of the requests alone; "
            f"allowed with {COUPLED}: False"
        )


def with_positions(states: Tensor, positions: Tensor) -> Tensor:
    """States [N, d] with the bytes of positions [N] behind: [N, d + 3]."""
    bytes_ = torch.stack([positions >> 8 * byte & 255 for byte in range(_BYTES)], 1)
    return torch.cat([states, bytes_.to(states.dtype)], 1)


def positions_of(states: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The states [N, d] and the positions [N] int64 that ride behind."""
    bytes_ = states[:, width:].long()
    return states[:, :width], sum(
        (bytes_[:, byte] << 8 * byte for byte in range(_BYTES)), bytes_.new_zeros(len(states))
    )


def leaning(logits: Tensor, ids: Tensor | None, positions: Tensor) -> Tensor:
    """The drafted tokens [N] int64 of logits [N, V'] whose columns have `ids`, each row of the request that the last
    step had in its place."""
    if not _requests:  # vLLM's first run, before there are requests
        best = logits.argmax(-1)
        return best if ids is None else ids[best]
    requests = _requests[0]
    tokens, _ = top_candidates(logits, 1, positions, requests.of(requests.slots[: len(logits)]), token_ids=ids)
    return tokens[:, 0]


def settings_of(sampling_params: SamplingParams) -> dict[str, Any]:
    """What `Sampling.of` takes, from a request's extra arguments; empty where it asks for none. ValueError for
    arguments that are not known, of another type or out of range."""
    given = {name: value for name, value in (sampling_params.extra_args or {}).items() if name.startswith(_PREFIX)}
    if not given:
        return {}
    allowed = ", ".join(_PREFIX + name for name in _SETTINGS)
    settings: dict[str, Any] = {}
    for name, value in given.items():
        kind = _SETTINGS.get(name.removeprefix(_PREFIX))
        if kind is None:
            raise ValueError(f"{name} is not known; allowed: {allowed}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_a(kind, value):
            raise ValueError(f"{name} is {value!r}; allowed: {'an integer' if kind is int else 'a number'}")
        settings[name.removeprefix(_PREFIX)] = kind(value)
    if not settings.get("temperature"):
        raise ValueError(f"{', '.join(given)} given without beagle_temperature above 0; allowed: with it")
    if sampling_params.temperature != 0.0:
        raise ValueError(
            f"temperature is {sampling_params.temperature} beside beagle_temperature; allowed: 0, as "
            "beagle_temperature takes its place"
        )
    if settings.get("top_k", 0) >= 2**31:
        raise ValueError(f"beagle_top_k is {settings['top_k']}; allowed: 0 (off) to {2**31 - 1}")
    Sampling.of(1, **settings)
    return settings


def _is_a(kind: type, value: float) -> bool:
    try:
        return kind(value) == value
    except (OverflowError, ValueError):  # infinite, NaN, or too large
        return False
