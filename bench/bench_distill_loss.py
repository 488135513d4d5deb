"""distill_loss with its gradient against the same in plain PyTorch and torch.compile, time and peak memory.

`pytest bench/bench_distill_loss.py --benchmark-group-by=group`
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from beagle_kernels import distill_loss
from bench.timing import device_for, timed

SHAPES = {
    # size -> (rows, width, vocabulary, dtype)
    "small": [(512, 576, 49152, torch.float32)],
    "full": [(8192, 4096, 128256, torch.bfloat16), (4096, 2048, 151936, torch.bfloat16)],
}


def naive(student, teacher, weight, row_weight):
    target = torch.softmax(teacher @ weight.T, -1)
    cross_entropy = F.cross_entropy(student @ weight.T, target, reduction="none")
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return (row_weight * (cross_entropy + 10.0 * distance)).sum()


def peak_memory(run, device: torch.device) -> int:
    """Bytes allocated at the worst moment, beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", ["beagle", "eager", "torch.compile"])
@pytest.mark.parametrize("size, shape", [(size, shape) for size in SHAPES for shape in SHAPES[size]], ids=str)
def test_distill_loss(benchmark, size, shape, name):
    device, (rows, width, vocab, dtype) = device_for(size), shape
    if name == "torch.compile" and device.type != "cuda":
        pytest.skip("compiled on a GPU only")
    weight = torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5
    row_weight = torch.rand(rows, device=device)
    inputs = [tuple(torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2)) for _ in range(2)]
    loss = {"beagle": distill_loss, "eager": naive}.get(name) or torch.compile(naive)

    def run(student, teacher):
        student = student.detach().requires_grad_()
        value = loss(student, teacher, weight, row_weight)
        return value, torch.autograd.grad(value, student)[0]

    small = [x[:64] for x in inputs[0]]
    student = small[0].double().requires_grad_()
    want = naive(student, small[1].double(), weight.double(), row_weight[:64].double())
    want_grad = torch.autograd.grad(want, student)[0]
    leaf = small[0].detach().requires_grad_()
    got = loss(leaf, small[1], weight, row_weight[:64])
    grad = torch.autograd.grad(got, leaf)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(got.item() / want.item() - 1) < tolerance
    assert (grad.double() - want_grad).norm() < tolerance * want_grad.norm()

    benchmark.group = f"distill_loss {rows} x {width}, {vocab} tokens, {dtype}"
    memory = peak_memory(lambda: run(*inputs[0]), device)
    work = {"flop": 6.0 * rows * width * vocab}
    timed(benchmark, run, inputs, work=work, peer=name, peak_bytes=memory)
