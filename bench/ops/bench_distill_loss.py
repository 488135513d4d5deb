"""distill_loss with its gradient against plain PyTorch, Liger's loss and torch.compile: time and peak memory; and its
three matrix products alone, whose time over ours is the share of what they allow.

`python -m bench distill_loss`. `python -m bench.ops.bench_distill_loss` compares the peak memory on this CPU with that
of plain PyTorch, which for the large shape does not fit and is reckoned from few rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from beagle_kernels import distill_loss
from beagle_kernels.cpu import distill_loss as on_cpu
from beagle_kernels.types import accumulation
from bench.peers import liger, or_reason
from bench.registry import Case, drive, label, parameters

SHAPES = {
    # size -> (rows, width, vocabulary, dtype)
    "tiny": [(64, 32, 300, torch.float32)],
    "small": [(512, 576, 49152, torch.float32)],
    "scaling": [(rows, 576, 49152, torch.float32) for rows in (64, 128, 256, 512)],
    "full": [(8192, 4096, 128256, torch.bfloat16), (4096, 2048, 151936, torch.bfloat16)],
}


def naive(student, teacher, weight, row_weight, regression=10.0):
    target = torch.softmax(teacher @ weight.T, -1)
    cross_entropy = F.cross_entropy(student @ weight.T, target, reduction="none")
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return (row_weight * (cross_entropy + regression * distance)).sum()


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


def with_gradient(loss, student, teacher, weight, row_weight, **options):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, weight, row_weight, **options)
    return value, torch.autograd.grad(value, student)[0]


def without_weights():
    """Liger's loss as the others are called; the three products and two softmaxes are the same."""
    loss = liger.forward_kl()
    return lambda student, teacher, weight, row_weight: loss(student, teacher, weight)


PRODUCTS = "its products alone"


def rows_at_once(rows: int, vocab: int, dtype: torch.dtype, device: str) -> int:
    """The chunk that distill_loss takes there: its logits, student's and teacher's, fill the budget."""
    if device == "cuda":
        from beagle_kernels.triton import distill_loss as on_gpu  # not above: it needs Triton

        return on_gpu.rows_at_once(-(-vocab // 16) * 16, dtype.itemsize, rows)
    return max(1, min(on_cpu.BUDGET // (2 * vocab * accumulation(dtype).itemsize), rows))


def products(student, teacher, weight, row_weight) -> torch.Tensor:
    """What distill_loss multiplies, chunk by chunk into one buffer, and nothing else: on a GPU the student's and the
    teacher's logits, on the CPU both at once, then the gradient through the head."""
    (rows, _), vocab, device = student.shape, len(weight), student.device.type
    chunk = rows_at_once(rows, vocab, student.dtype, device)
    # rows a multiple of 16 apart, as the op has them on a GPU
    stride = -(-vocab // 16) * 16 if device == "cuda" else vocab
    logits = student.new_empty(2 * chunk, stride)[:, :vocab]
    gradient = torch.empty_like(student)
    for s, t, out in zip(student.split(chunk), teacher.split(chunk), gradient.split(chunk), strict=True):
        z = logits[: len(s)]
        if device == "cuda":
            torch.mm(s, weight.T, out=z)
            torch.mm(t, weight.T, out=logits[chunk : chunk + len(s)])
        else:
            torch.mm(torch.cat([s, t]), weight.T, out=logits[: 2 * len(s)])
        torch.mm(z, weight, out=out)
    return gradient


def losses(device: str) -> dict[str, Any]:
    """Callables by name, or the reason why one is left out; the compiled one last, since its first call takes long."""
    return {
        "beagle": distill_loss,
        "eager": naive,
        "Liger, cross-entropy alone": or_reason(liger.why_not(device), without_weights),
        "torch.compile": torch.compile(naive) if device == "cuda" else "compiled on a GPU only",
    }


def check(name: str, loss, student, teacher, weight, row_weight) -> None:
    """Raise unless value and gradient are those of the float64 computation; of Liger's, the gradient alone."""
    options = {}
    if name.startswith("Liger"):
        options, row_weight = {"regression": 0.0}, torch.full_like(row_weight, 1 / len(row_weight))
    value, gradient = with_gradient(loss, student, teacher, weight, row_weight)
    truth = [x.double() for x in (student, teacher, weight, row_weight)]
    want, want_gradient = with_gradient(naive, *truth, **options)
    tolerance = 1e-5 if student.dtype == torch.float32 else 2e-2
    assert name.startswith("Liger") or abs(value.item() / want.item() - 1) < tolerance, "the loss is wrong"
    assert (gradient.double() - want_gradient).norm() < tolerance * want_gradient.norm(), "the gradient is wrong"


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for rows, width, vocab, dtype in SHAPES[size]:
        weight = torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5
        drawn = [[torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
        row_weight = torch.rand(rows, device=device)
        yield of_inputs([(*states, weight, row_weight) for states in drawn])


def of_inputs(inputs: list[tuple]) -> Case:
    student, _, weight, row_weight = inputs[0]
    (rows, width), vocab, device = student.shape, len(weight), student.device
    few = *(x[:64] for x in inputs[0][:2]), weight, row_weight[:64]
    found = losses(device.type)

    def run(loss) -> Callable:
        return lambda *args: with_gradient(loss, *args)

    timed: dict[str, Any] = {name: loss if isinstance(loss, str) else run(loss) for name, loss in found.items()}
    peers = {"beagle": timed.pop("beagle"), PRODUCTS: products, **timed}
    return Case(
        f"distill_loss {rows} x {width}, {vocab} tokens, {student.dtype}",
        peers,
        lambda: check("beagle", found["beagle"], *few),
        check_peer=lambda name: None if name == PRODUCTS else check(name, found[name], *few),
        bounds=(PRODUCTS,),
        rounds=5,
        device=device.type,
        inputs=inputs,
        work={"flop": 6.0 * rows * width * vocab},
        at={"rows": rows, "width": width, "vocabulary": vocab, "type": str(student.dtype)[6:]},
        notes=lambda name: {"peak_bytes": peak_memory(lambda: peers[name](*inputs[0]), device)},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_distill_loss(benchmark, case, peer):
    drive(benchmark, case, peer)


def compared_memory(rows: int, width: int, vocab: int, few: int | None = None) -> dict:
    """Peak bytes of both in fp32 on this CPU, and ours over eager's.

    few: eager is then run with few and 2 few rows, and each further one is reckoned to need as much more as those did,
    its logits being [rows, vocab]. Ours has all rows, but only 2 few of weight: enough for several of its chunks, whose
    logits take each other's place, so that more would need time and no memory.
    """
    weight = torch.randn(vocab, width) * width**-0.5

    def peak(loss, count: int, counted: int) -> int:
        student, teacher = torch.randn(2, count, width)
        row_weight = (torch.arange(count) < counted).float()
        return peak_memory(lambda: with_gradient(loss, student, teacher, weight, row_weight), weight.device)

    ours = peak(distill_loss, rows, rows if few is None else 2 * few)
    if few is None:
        eager = peak(naive, rows, rows)
    else:
        one, two = (peak(naive, count, count) for count in (few, 2 * few))
        eager = two + (two - one) // few * (rows - 2 * few)
    return {
        "rows": rows,
        "width": width,
        "vocab": vocab,
        "beagle_peak_bytes": ours,
        "eager_peak_bytes": eager,
        "eager_reckoned_from_rows": few and 2 * few,
        "ratio": round(ours / eager, 4),
    }


if __name__ == "__main__":
    for found in (compared_memory(512, 576, 49152), compared_memory(8192, 4096, 128256, few=128)):
        print(json.dumps(found), flush=True)
