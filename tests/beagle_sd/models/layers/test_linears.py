"""Linear layers in decoding: which ones go through skinny_linear, and when."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from models import small_target
from torch import nn

from beagle_kernels import skinny_linear
from beagle_kernels.extension import missing_cpu
from beagle_sd import generate
from beagle_sd.models.layers.linears import MOST_ROWS, few_rows_forward, linear

pytestmark = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")


class Mine(nn.Linear):
    """A subclass, as quantized and adapted layers are."""


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "plain": nn.Linear(48, 32, bias=False),
            "bias": nn.Linear(48, 32),
            "subclass": Mine(48, 32),
            "float64": nn.Linear(48, 32).double(),
            "hooked": add_hook_to_module(nn.Linear(48, 32), ModelHook()),
            "convolution": nn.Conv1d(4, 4, 1),
        }
    )


def test_plain_layers_alone_are_served():
    assert {name for name, module in model().items() if few_rows_forward(module) is not None} == {"plain", "bias"}


@pytest.mark.parametrize("dtype", list(MOST_ROWS), ids=str)
def test_few_rows_without_gradients_go_through_skinny_linear(dtype):
    most = MOST_ROWS[dtype]
    x, layer = torch.randn(2, most, 576).to(dtype), nn.Linear(576, 192).to(dtype)
    with torch.inference_mode():
        few, many = x[:1], x
        assert torch.equal(linear(few, layer.weight), skinny_linear(few, layer.weight))
        assert torch.equal(linear(few, layer.weight, layer.bias), skinny_linear(few, layer.weight) + layer.bias)
        assert torch.equal(linear(many, layer.weight), F.linear(many, layer.weight))
    forward = few_rows_forward(layer)
    out = forward(x[:1])
    assert out.requires_grad and torch.equal(out, F.linear(x[:1], layer.weight, layer.bias))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert forward(x[:1]).dtype == torch.bfloat16


def test_generate_leaves_the_target_as_it_was():
    target = small_target()
    before = {name: set(module.__dict__) for name, module in target.named_modules()}
    generate(target, None, torch.arange(5)[None], max_new_tokens=3)
    assert {name: set(module.__dict__) for name, module in target.named_modules()} == before
