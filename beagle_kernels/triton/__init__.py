"""The attention ops and the distillation loss as Triton kernels. Importing this does not import Triton: a call does."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

import torch

from ..backends import device_index, implementation, probe

MODULES = {
    "block_attention": "block_attention",
    "block_attention_backward": "block_attention_backward",
    "extend_attention": "extend_attention",
    "extend_attention_backward": "extend_attention",
    "tree_attention": "tree_attention",
    "distill_loss": "distill_loss",
}


LEAST_CAPABILITY = (8, 0)
"""The kernels are made for bf16 products and asynchronous copies, which earlier cards have not."""


@probe("triton")
def why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return _too_old(device_index(device)) if torch.cuda.is_available() else None
    if device.type == "cpu" and interpreting():
        return None
    return "it takes CUDA tensors (CPU tensors only under Triton's interpreter)"


@functools.cache
def _too_old(index: int) -> str | None:
    have = torch.cuda.get_device_capability(index)
    if torch.version.hip or have >= LEAST_CAPABILITY:
        return None
    return f"cuda:{index} has compute capability {have[0]}.{have[1]}; allowed: 8.0 or later"


def interpreting() -> bool:
    """Whether Triton has been imported with its interpreter on."""
    triton = sys.modules.get("triton")
    return triton is not None and triton.knobs.runtime.interpret


def _register_on_first_call(op: str, module: str) -> None:
    """Stand in for the implementation until its module, which registers the real one, has been imported."""

    @implementation(op, "triton")
    def first_call(*args):
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*args)


for _op, _module in MODULES.items():
    _register_on_first_call(_op, _module)
