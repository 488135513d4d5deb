"""Coupled sampling in vLLM: greedy verification of perturbed logits, so that a sampled text does not depend on the
draft and is that of `beagle_sd.generate` with the same seed.

A request says temperature 0, which is vLLM's greedy acceptance, and has in its extra arguments (`vllm_xargs` of the
server) beagle_temperature and, if wanted, beagle_seed, beagle_top_k, beagle_top_p, beagle_min_p.
"""

from __future__ import annotations

from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from beagle_kernels import Sampling, perturb_logits
from beagle_sd.vllm import lean


class Coupled(LogitsProcessor):
    """filtered(z) + T g(seed, position, token) of the requests that ask for it, which go on to vLLM's argmax."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self.requests = lean.Requests(req_states.max_num_reqs, req_states.device)
        self.coupled = [False] * req_states.max_num_reqs
        self.staged: dict[int, Sampling] = {}
        self.filled = 0
        lean.use(self.requests)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        lean.settings_of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        settings = lean.settings_of(sampling_params)
        self.coupled[req_idx] = bool(settings)
        self.staged[req_idx] = Sampling.of(1, **settings)
        return True  # in a step without such a request `apply` would not be called, and the slots stay another step's

    def apply_staged_writes(self) -> None:
        self.filled = 0
        for slot, settings in self.staged.items():
            for tensor, value in zip(self.requests.sampling, settings, strict=True):
                tensor[slot : slot + 1].copy_(value)
        self.staged.clear()

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        # a large batch comes in parts
        begin, self.filled = self.filled, self.filled + len(ctx.idx_mapping)
        self.requests.slots[begin : self.filled].copy_(ctx.idx_mapping)
        if not any(self.coupled[slot] for slot in ctx.idx_mapping_np.tolist()):
            return logits
        # the rows of other requests have temperature 0, which leaves them what they are
        return perturb_logits(logits, ctx.pos.long() + 1, self.requests.of(ctx.expanded_idx_mapping))[0]
