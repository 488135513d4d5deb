"""What bench.smoke checks of the ops: a function takes the device, raises where something is wrong, and returns what is
to be printed, if anything.

The sampling and tree ops must equal the host's bit for bit, the attention ops and the loss come as close to float64 as
eager PyTorch in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

import beagle_kernels as bk
from beagle_kernels import Sampling, backends
from beagle_kernels.adjust_logits import adjust_logits as reference_adjusted
from beagle_kernels.decoder_layer import decoder_layer as defined_layer
from beagle_kernels.reference.block_attention import visible_keys
from beagle_kernels.reference.tree_attention import visible_slots
from bench.registry import moved

NODES = 60
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = {BF16: 2.0**-8, FP32: 2.0**-21}
"""Half a unit in the last place of bf16; what three TF32 products lose of one in fp32."""
EDGES = {"byte/s": (1e11, 2e13), "flop/s": (1e13, 1e16)}
"""Rates outside are a clock's fault."""


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated inside holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def as_on_the_host(device: str, op: Callable, *args, **options) -> None:
    """Every tensor of the result equals the host's."""
    want = op(*args, **options)
    with poisoned():
        have = op(*moved(args, device), **options)
    for number, (one, other) in enumerate(zip(want, have, strict=True)):
        if isinstance(one, Tensor):
            assert torch.equal(one, other.cpu()), f"{op.__name__} {options}: result {number} is not the host's"


def close(what: str, have: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, factor: float) -> None:
    """Error against float64 at most `factor` times eager PyTorch's in the same precision."""
    for name, size in (("largest", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
        error, usual = (size(x.double().cpu() - exact).item() for x in (have, eager))
        allowed = factor * max(usual, ROUNDING[dtype] * size(exact).item())
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"


def as_good_as_eager(device: str, op: Callable, eager: Callable, given: list[Tensor]) -> None:
    """An op's result and its gradient in every tensor given, beside those of the same in eager PyTorch."""
    results = []
    for function, where, kind in ((op, device, None), (eager, device, None), (eager, "cpu", torch.float64)):
        leaves = [x.to(where, kind, copy=True).requires_grad_() for x in given]
        with poisoned():
            out = function(*leaves)
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, up)])
    for number, (have, near, exact) in enumerate(zip(*results, strict=True)):
        what = f"gradient of input {number - 1}" if number else "result"
        close(what, have, near, exact, given[0].dtype, 3 if number else 2)


def which_kernels(device: str) -> str:
    """No op falls back to the reference, but those of a backend that is for another device."""
    served = {op: backends.resolve(op, "auto", torch.device(device), FP32) for op in backends.table()}
    if device == "cuda":
        of_a_cpu = "skinny_linear", "int8_linear", "decoder_layer"
        served = {op: backend for op, backend in served.items() if op not in of_a_cpu}
    slow = [op for op, backend in served.items() if backend == "reference"]
    why = {backends.why_not(op, backend, torch.device(device)) for op in slow for backend in backends.BACKENDS[:-1]}
    assert not slow, f"served by the reference: {', '.join(slow)}: {why}"
    return ", ".join(f"{op} {backend}" for op, backend in served.items())


def limits(device: str) -> str:
    """The machine's own rates, measured beside the other checks, so a little low."""
    from bench.timing import limits as measured

    found = measured()
    for unit, (low, high) in EDGES.items():
        assert low < found[unit] < high, f"{found[unit]:.3g} {unit}; allowed: {low:g} to {high:g}"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return f"{torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free, {found}"


def adjust_logits(device: str) -> None:
    """Beside the definition on the host, to the bit."""
    text, paths = torch.randint(9, (2, 300)), torch.randint(9, (2, 5, 3))
    lengths, prompts = torch.tensor([[300, 40], [20, 40]], dtype=torch.int32)
    phrases = [((3, 4), 0.5, -1), ((2,), -torch.inf, 1)]
    tables = torch.randn(2, 49152), torch.randint(999, (2, 49152), dtype=torch.int32)
    settings = bk.Adjustments.of(2, repetition=1.2, frequency=0.1, presence=0.2, ngram=3, phrases=phrases)
    allowed = torch.randint(-(2**31), 2**31 - 1, (2, 5, 1536), dtype=torch.int32)
    for dtype in (BF16, FP32):
        for given in (settings, bk.Adjustments(*tables, *settings[2:])):
            args = torch.randn(2, 5, 49152).to(dtype), paths, text, lengths, prompts, given
            want = reference_adjusted(*args, allowed=allowed, backend="reference")
            with poisoned():
                have = bk.adjust_logits(*moved(args, device), allowed=allowed.to(device))
            assert torch.equal(have.cpu(), want), "adjust_logits is not the definition's"


def choose_tokens(device: str) -> None:
    logits, positions = torch.randn(9, 49152).to(BF16), torch.arange(9)
    logits[3, 7:] = float("-inf")
    for settings in ((0.0,), (1.0,), (0.7, 0, 0.9), (1.2, 50, 0.95, 0.02)):
        sampling = Sampling.of(9, 3, *settings)
        as_on_the_host(device, bk.choose_tokens, logits, positions, sampling)
        values, status = bk.perturb_logits(logits, positions, sampling)
        have, found = bk.perturb_logits(*moved((logits, positions, sampling), device))
        assert torch.equal(found.cpu(), status), "perturb_logits: status is not the host's"
        torch.testing.assert_close(have.cpu(), values, rtol=1e-6, atol=2e-5)
        args = logits, 10, positions, sampling
        tokens, scores = bk.top_candidates(*args)
        found, near = bk.top_candidates(*moved(args, device))
        assert torch.equal(found.cpu(), tokens), "top_candidates: tokens are not the host's"
        torch.testing.assert_close(near.cpu(), scores, rtol=1e-5, atol=2e-5)


def drawn_candidates(batch: int = 3, count: int = 80) -> tuple:
    """What build_tree takes: every candidate's parent drawn from those before it."""
    parents = [[int(torch.randint(-1, i, ())) if i else -1 for i in range(count)] for _ in range(batch)]
    scores = -torch.arange(1.0, count + 1).repeat(batch, 1)
    return torch.ones(batch).long(), torch.randint(2, (batch, count)), scores, torch.tensor(parents).int(), NODES, count


def trees(device: str) -> None:
    candidates = drawn_candidates()
    tree = bk.build_tree(*candidates)
    as_on_the_host(device, bk.build_tree, *candidates)
    as_on_the_host(device, bk.accept_tree, tree, torch.randint(2, (3, NODES)))
    for temperature in (0.0, 1.0):
        args = torch.randn(3, NODES, 1000), tree, torch.arange(3), Sampling.of(3, 0, temperature)
        as_on_the_host(device, bk.verify_tree, *args)


def drafts_without_a_model(device: str) -> None:
    """Texts that repeat themselves now and then looked up in, and what is found there among candidates."""
    text, lengths = torch.randint(3, (3, 5000)), torch.tensor([5000, 700, 1]).int()
    as_on_the_host(device, bk.lookup, text, lengths, 9)
    _, *candidates, _, _ = drawn_candidates()
    scores = -torch.rand(3, 9).cumsum(1)
    as_on_the_host(device, bk.join_branch, *candidates, bk.lookup(text, lengths, 9)[0], scores)


def verify_chain(device: str) -> None:
    args = torch.randn(4, 5, 49152), torch.randn(4, 4, 49152), torch.randint(49152, (4, 4)), torch.arange(4)
    for rule in ("token", "block"):
        as_on_the_host(device, bk.verify_chain, *args, Sampling.of(4, 0, 0.9), rule)


def compact_cache_(device: str) -> None:
    path, count = torch.tensor([[0, 2, 5, -1], [0, 1, 2, 3], [0, -1, -1, -1]]).int(), torch.tensor([2, 3, 0]).int()
    lengths, table = torch.tensor([3, 40, 90]).int(), torch.randperm(24).int().view(3, 8)
    for shape, pages in (((4, 2, 3, 2, 128, 64), None), ((4, 2, 24, 2, 16, 64), table)):
        for dtype in (BF16, FP32):
            before = torch.randn(shape).to(dtype)
            host, there = before.clone(), before.to(device, copy=True)
            for one, where in ((host, "cpu"), (there, device)):
                bk.compact_cache_(one, *moved((path, count, lengths), where), block_table=moved(pages, where))
            assert not torch.equal(host, before)
            assert torch.equal(there.cpu(), host), f"{dtype}, paged: {pages is not None}: not the host's"


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention: q [..., N, Hq, D], k and v [..., S, Hkv, D], seen bool [..., N, S]; out and lse."""
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    scores = torch.einsum("...nhd,...shd->...hns", q, k) * q.shape[-1] ** -0.5
    seen = seen.unsqueeze(-3)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return torch.einsum("...hns,...shd->...nhd", scores.softmax(-1) * seen, v), scores.logsumexp(-1).mT


def block_attention(device: str, width: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Two sequences in one pack; rows before the first window see nothing."""
    rows, window, offset, bounds = 700, 4, torch.tensor([1, 3]).int(), torch.tensor([0, 400, 700]).int()
    first, end = visible_keys(rows, window, offset, bounds)
    seen = (torch.arange(rows) >= first[:, None]) & (torch.arange(rows) < end[:, None])

    def op(q, k, v):
        return bk.block_attention(q, k, v, window, *moved((offset, bounds), device))[0]

    given = [torch.randn(rows, count, width).to(dtype) for count in (heads[0], heads[1], heads[1])]
    as_good_as_eager(device, op, lambda q, k, v: dense(q, k, v, seen.to(q.device))[0], given)


def extend_attention(device: str) -> None:
    """Rows with keys of their own beside those they have seen, and the first with those alone."""
    given = [torch.randn(shape).to(BF16) for shape in ((200, 9, 64),) * 2 + ((200, 3, 3, 64),) * 2]
    given.insert(1, torch.randn(200, 9))

    def eager(out, lse, q, k, v):
        local, local_lse = dense(q[:, None], k, v, torch.ones(200, 1, 3, dtype=torch.bool, device=q.device))
        total = torch.logaddexp(lse, local_lse[:, 0].to(lse))
        old, new = (torch.exp(part - total)[..., None].to(out) for part in (lse, local_lse[:, 0]))
        return old * out + new * local[:, 0]

    as_good_as_eager(device, lambda *leaves: bk.extend_attention(*leaves)[0], eager, given)


def tree_attention(device: str, width: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """A cache in one piece and in pages; what no node sees is NaN."""
    mask, lengths = bk.build_tree(*drawn_candidates()).mask, torch.tensor([0, 63, 570]).int()
    q, (k, v) = torch.randn(3, NODES, heads[0], width).to(dtype), torch.randn(2, 3, heads[1], 640, width).to(dtype)
    seen = visible_slots(640, lengths, mask)
    slots = k.transpose(1, 2), v.transpose(1, 2)
    eager, exact = (
        dense(q.to(where, kind), slots[0].to(where, kind), slots[1].to(where, kind), seen.to(where))[0]
        for where, kind in ((device, dtype), ("cpu", torch.float64))
    )
    for x in (k, v):
        x.masked_fill_(~seen.any(1)[:, None, :, None], float("nan"))
    order = torch.randperm(120)
    pages = [x.unflatten(2, (40, 16)).transpose(1, 2).flatten(0, 1)[order].contiguous() for x in (k, v)]
    for name, cache, table in (("whole", (k, v), None), ("paged", pages, order.argsort().int().view(3, 40))):
        with poisoned():
            out = bk.tree_attention(*moved((q, *cache, lengths, mask), device), block_table=moved(table, device))
        close(f"{name} cache", out, eager, exact, dtype, 2)


def distill_loss(device: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(300, 576).to(dtype) for _ in range(2))
    weight, counts = (torch.randn(5000, 576) * 576**-0.5).to(dtype), torch.randn(300).relu()

    def eager(s):
        t, w, row = (x.to(s) for x in (teacher, weight, counts))
        soft = F.cross_entropy(s @ w.T, (t @ w.T).softmax(-1), reduction="none")
        return (row * (soft + 10 * F.smooth_l1_loss(s, t, reduction="none").mean(-1))).sum()

    def op(s):
        return bk.distill_loss(s, *moved((teacher, weight, counts), device))

    as_good_as_eager(device, op, eager, [student])


def skinny_linear(device: str) -> None:
    for dtype in (FP32, BF16):
        x, weight = torch.randn(7, 576).to(dtype), torch.randn(1000, 576).to(dtype)
        exact = F.linear(x.double(), weight.double())
        error, usual = ((y.double() - exact).norm() for y in (bk.skinny_linear(x, weight), F.linear(x, weight)))
        assert error <= 2 * max(usual, torch.finfo(dtype).eps / 4 * exact.norm()), f"{dtype}: {error} against {usual}"


def int8_linear(device: str) -> None:
    weight, scales = torch.randint(-127, 128, (1000, 576), dtype=torch.int8), torch.rand(1000, 9)
    for dtype in (FP32, BF16):
        x = torch.randn(7, 576).to(dtype)
        want = bk.int8_linear(x, weight, scales, backend="reference")
        assert torch.equal(bk.int8_linear(x, weight, scales), want), f"{dtype}: not the definition's bits"


def decoder_layer(device: str) -> None:
    """Beside the definition: what comes out, and the keys that are written."""

    def linear(outputs: int, inputs: int) -> bk.Linear:
        return bk.Linear(torch.randn(outputs, inputs) * inputs**-0.5)

    attention = linear(576, 576), linear(192, 576), linear(192, 576), linear(576, 576)
    norm = bk.Norm(torch.rand(576) + 0.5, 1e-5)
    mlp = linear(1536, 576), linear(1536, 576), linear(576, 1536)
    layer = bk.LayerWeights(*attention, *mlp, norm_in=norm, norm_mlp=norm)
    keys, values = torch.randn(2, 1, 3, 320, 64)
    angles = torch.rand(1, 7, 64) * 6
    lengths, mask = torch.tensor([300], dtype=torch.int32), ((2 << torch.arange(7)) - 1)[None, :, None]
    given = torch.randn(1, 7, 576), layer, angles.cos(), angles.sin()
    kept = [(keys.clone(), values.clone()) for _ in range(2)]
    have = bk.decoder_layer(*given, *kept[0], lengths, mask)
    want = defined_layer(*given, *kept[1], lengths, mask, backend="reference")
    for what, one, two in (("result", have, want), *zip(("keys", "values"), *kept)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=f"decoder_layer: {what} is not the definition's")
