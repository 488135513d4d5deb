"""distill_loss against the same loss written with whole logits and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from beagle_kernels.distill_loss import distill_loss

BACKENDS = ["reference", "cpu"]


def inputs(rows: int, d: int, vocab: int, dtype=torch.float64, peaky: float = 1.0, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    student, teacher, weight = (
        torch.randn(n, d, generator=gen, dtype=torch.float64) * s for n, s in ((rows, 1), (rows, 1), (vocab, peaky))
    )
    row_weight = torch.rand(rows, generator=gen) * (torch.rand(rows, generator=gen) > 0.3)
    row_weight = row_weight.double() if dtype == torch.float64 else row_weight
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype), row_weight


def naive(student, teacher, weight, row_weight, regression=10.0):
    target = torch.softmax(teacher @ weight.T, -1)
    cross_entropy = F.cross_entropy(student @ weight.T, target, reduction="none")
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return (row_weight * (cross_entropy + regression * distance)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, d, vocab", [(1, 3, 1), (63, 8, 113), (130, 16, 1025)])
@pytest.mark.parametrize("regression", [0.0, 10.0])
def test_equals_naive(backend, rows, d, vocab, regression):
    args = inputs(rows, d, vocab)
    got = distill_loss(*args, regression=regression, backend=backend)
    want = naive(*args, regression=regression)
    torch.testing.assert_close(got, want)
    (got_grad,), (want_grad,) = (torch.autograd.grad(3.0 * x, args[:1]) for x in (got, want))
    torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaky_logits(backend):
    """Logits in the thousands overflow nothing."""
    args = inputs(20, 16, 97, peaky=1e3)
    got, want = distill_loss(*args, backend=backend), naive(*args)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, args[0]), torch.autograd.grad(want, args[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_near_eager(backend, dtype):
    """Against float64 the error is at most twice eager PyTorch's (three times for the gradient)."""
    args = inputs(100, 32, 501, dtype)
    exact = [x.detach().double() for x in args]
    exact[0].requires_grad_()
    want = naive(*exact)
    want_grad = torch.autograd.grad(want, exact[0])[0]

    def error(fn):
        loss = fn(*args)
        grad = torch.autograd.grad(loss, args[0])[0]
        return (loss.double() - want).abs() / want.abs(), (grad.double() - want_grad).norm() / want_grad.norm()

    got, eager = error(lambda *x: distill_loss(*x, backend=backend)), error(naive)
    floor = torch.finfo(dtype).eps / 2
    assert got[0] <= 2 * max(eager[0], torch.finfo(torch.float32).eps) and got[1] <= 3 * max(eager[1], floor / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero(backend):
    """They may hold anything, and get a gradient of exactly zero; all of them zero gives a loss of zero."""
    student, teacher, weight, row_weight = inputs(40, 8, 33)
    want = distill_loss(student, teacher, weight, row_weight, backend=backend)
    unused = row_weight == 0
    assert 0 < unused.sum() < 40
    poisoned = student.detach().clone(), teacher.clone()
    for x in poisoned:
        x[unused] = float("nan")
    poisoned[0].requires_grad_()
    got = distill_loss(*poisoned, weight, row_weight, backend=backend)
    got.backward()
    assert torch.equal(got, want) and not poisoned[0].grad[unused].any() and poisoned[0].grad[~unused].all()
    got = distill_loss(*poisoned, weight, torch.zeros_like(row_weight), backend=backend)
    assert got == 0 and not torch.autograd.grad(got, poisoned[0])[0].any()
    assert distill_loss(student[:0], teacher[:0], weight, row_weight[:0], backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_the_student_only(backend):
    student, teacher, weight, row_weight = inputs(9, 8, 33)
    teacher.requires_grad_(), weight.requires_grad_()
    distill_loss(student, teacher, weight, row_weight, backend=backend).backward()
    assert student.grad is not None and teacher.grad is None and weight.grad is None
    assert not distill_loss(student.detach(), teacher, weight, row_weight, backend=backend).requires_grad


def test_memory_stays_within_the_budget(monkeypatch):
    """At most the budget and a little of the rows' own size, where naive PyTorch holds several times all logits."""
    from beagle_kernels.cpu import distill_loss as module
    from bench.ops.bench_distill_loss import peak_memory

    monkeypatch.setattr(module, "BUDGET", 1 << 20)
    args = inputs(512, 16, 4096, torch.float32)
    cpu = torch.device("cpu")
    got = peak_memory(lambda: distill_loss(*args, backend="cpu").backward(), cpu)
    eager = peak_memory(lambda: naive(*args).backward(), cpu)
    assert eager > 4 * 512 * 4096 * 4 > 4 * got > 4 << 20 and got < (1 << 20) + 20 * 512 * 16 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    student, teacher, weight, row_weight = inputs(9, 8, 33)
    strided = student.T.contiguous().T, teacher.expand(9, 8), weight.T.contiguous().T
    want = distill_loss(student, teacher, weight, row_weight, backend=backend)
    torch.testing.assert_close(distill_loss(*strided, row_weight, backend=backend), want)


def test_gradcheck():
    student, *rest = inputs(6, 4, 11)
    assert torch.autograd.gradcheck(lambda s: distill_loss(s, *rest, backend="reference"), student)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(backend, gradient):
    student, *rest = inputs(6, 4, 11, torch.float32)
    student = student.requires_grad_(gradient)
    opcheck(torch.ops.beagle.distill_loss.default, (student, *rest, 10.0, gradient, False, backend))


def test_compiles_in_one_graph():
    args = inputs(9, 8, 33, torch.float32)
    compiled = torch.compile(lambda *x: distill_loss(*x) / 2, fullgraph=True, backend="aot_eager")
    got, want = compiled(*args), naive(*args) / 2
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, args[0]), torch.autograd.grad(want, args[0]))


def test_bad_inputs():
    student, teacher, weight, row_weight = inputs(9, 8, 33, torch.float32)
    for args, error, message in [
        ((student, teacher[:4], weight, row_weight), ValueError, r"teacher has shape \[4, 8\]"),
        ((student, teacher, weight[:, :5], row_weight), ValueError, r"weight has shape \[33, 5\]"),
        ((student, teacher, weight.half(), row_weight), TypeError, "weight is float16"),
        ((student, teacher, weight, row_weight.long()), TypeError, "row_weight is int64"),
        ((student, teacher, weight[:0], row_weight), ValueError, "at least one token"),
    ]:
        with pytest.raises(error, match=message):
            distill_loss(*args)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_set_and_put_back(tf32, monkeypatch):
    """Around float32 products alone, whatever the setting was, and if they fail."""
    pytest.importorskip("triton")
    from beagle_kernels.triton import distill_loss as kernels

    student, *rest = inputs(6, 4, 11, torch.float32)
    settings, seen = torch.backends.cuda.matmul, []

    def fail(*args):
        seen.append(settings.fp32_precision)
        raise ZeroDivisionError

    monkeypatch.setattr(kernels, "_by_chunks", fail)
    before = settings.fp32_precision
    with pytest.raises(ZeroDivisionError):
        kernels.distill_loss(student, *rest, 10.0, True, tf32)
    with pytest.raises(ZeroDivisionError):
        kernels.distill_loss(student.bfloat16(), *rest, 10.0, True, tf32)
    assert seen == ["tf32" if tf32 else "ieee", before] and settings.fp32_precision == before


def test_chunks_are_multiples_of_256_rows():
    pytest.importorskip("triton")
    from beagle_kernels.triton.distill_loss import rows_at_once

    assert rows_at_once(128256, 2, 8192) == 1024 and rows_at_once(128256, 2, 700) == 700
    assert rows_at_once(1 << 22, 4, 8192) == 16 and rows_at_once(1 << 30, 4, 9) == 1 == rows_at_once(16, 4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_goes_in_and_nothing_inside(backend):
    student, teacher, weight, row_weight = inputs(20, 8, 33, torch.float32)
    want = distill_loss(student.bfloat16(), teacher.bfloat16(), weight.bfloat16(), row_weight, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = distill_loss(student, teacher, weight, row_weight, backend=backend)
    assert torch.equal(got, want) and got.dtype == torch.float32
    assert torch.autograd.grad(got, student)[0].dtype == torch.float32


def test_no_cuda_graph_may_hold_it():
    assert torch.Tag.cudagraph_unsafe in torch.ops.beagle.distill_loss.default.tags


@pytest.mark.parametrize("general", ["highest", "high", "medium"])
@pytest.mark.parametrize("own", [None, "tf32", "ieee"])
@pytest.mark.parametrize("tf32", [False, True])
def test_torchs_two_settings_agree_inside(tf32, own, general):
    """Where they disagree torch refuses float32 products; a user may have set one, the other, or both."""
    pytest.importorskip("triton")
    from beagle_kernels.triton.distill_loss import products

    matmul = torch.backends.cuda.matmul
    at_first = matmul.fp32_precision

    def settings() -> list[str]:
        found = [matmul.fp32_precision]
        try:
            return [*found, torch.get_float32_matmul_precision()]
        except RuntimeError:
            return [*found, "refused"]

    try:
        torch.set_float32_matmul_precision(general)
        if own:
            matmul.fp32_precision = own
        before = settings()
        with products(tf32):
            assert matmul.allow_tf32 is tf32 and settings() == (["tf32", "high"] if tf32 else ["ieee", "highest"])
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = at_first
