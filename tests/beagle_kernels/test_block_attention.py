"""block_attention and extend_attention as the trainer uses them: windows, packing, and the paper's figure-2 mask."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from beagle_kernels.block_attention import block_attention
from beagle_kernels.extend_attention import extend_attention

BACKENDS = ["reference", "cpu"]


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(rows: int, hq: int, hkv: int, d: int, dtype=torch.float64, grad: bool = True, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    shapes = (rows, hq, d), (rows, hkv, d), (rows, hkv, d)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def literal(q, k, v, window, offsets, lengths, reach=None):
    """Row by row, in the words of the definition."""
    outs, lses, base, group = [], [], 0, q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    for offset, length in zip(offsets, lengths, strict=True):
        for i in range(length):
            end = max(offset + (i - offset) // window * window, 0) if i >= offset else 0
            first = 0 if reach is None else min(max(i - reach, 0), end)
            keys = k[base + first : base + end].repeat_interleave(group, 1)
            values = v[base + first : base + end].repeat_interleave(group, 1)
            scores = torch.einsum("hd,jhd->hj", q[base + i], keys) * scale
            sees = first < end
            lses.append(scores.logsumexp(-1) if sees else q.new_full(q.shape[1:2], float("-inf")))
            outs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), values) if sees else torch.zeros_like(q[0]))
        base += length
    return torch.stack(outs), torch.stack(lses)


CASES = [
    # window, reach, offsets, lengths, query heads, key heads
    (5, None, [0], [1], 2, 1),
    (5, None, [3], [63], 4, 4),
    (1, None, [0], [17], 4, 1),
    (4, None, [1, 0, 3, 2], [13, 0, 1, 30], 4, 2),
    (7, None, [9], [40], 2, 2),
    (64, None, [0], [63], 2, 2),
    (5, 1, [3], [40], 4, 2),
    (5, 4, [3], [40], 2, 1),
    (5, 5, [3], [40], 2, 1),
    (4, 11, [1, 0, 3, 2], [13, 0, 1, 30], 4, 2),
    (4, 2**40, [1, 2], [13, 20], 2, 2),
    (64, 9, [10], [63], 2, 2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window, reach, offsets, lengths, hq, hkv", CASES)
def test_equals_the_definition(backend, window, reach, offsets, lengths, hq, hkv):
    q, k, v = inputs(sum(lengths), hq, hkv, 8)
    offset = torch.tensor(offsets, dtype=torch.int32)
    cu = None if len(lengths) == 1 else packed(lengths)
    out, lse = block_attention(q, k, v, window, offset, cu, reach=reach, backend=backend)
    want_out, want_lse = literal(q, k, v, window, offsets, lengths, reach)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)

    up = torch.randn_like(out), torch.randn_like(lse)
    seen = want_lse > float("-inf")
    got = torch.autograd.grad((out * up[0]).sum() + (lse * up[1])[seen].sum(), (q, k, v))
    loss = (want_out * up[0]).sum() + (want_lse * up[1])[seen].sum()
    if loss.requires_grad and seen.any():
        want = torch.autograd.grad(loss, (q, k, v))
    else:
        want = [torch.zeros_like(x) for x in (q, k, v)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key(backend):
    """They give 0, -inf and no gradient whatever comes from above, also past the last sequence."""
    q, k, v = inputs(20, 2, 1, 8)
    offset = torch.tensor([2, 3], dtype=torch.int32)
    out, lse = block_attention(q, k, v, 5, offset, packed([9, 6]), backend=backend)
    empty = torch.tensor([i < 2 or 9 <= i < 12 or i >= 15 for i in range(20)])
    assert torch.equal(lse == float("-inf"), empty[:, None].expand(-1, 2))
    assert not out[empty].any() and out[~empty].all()
    (out.sum() + lse.sum()).backward()
    assert not q.grad[empty].any() and all(torch.isfinite(x.grad).all() for x in (q, k, v))
    assert not k.grad[15:].any() and not v.grad[15:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("through", ["out", "lse"])
def test_partial_gradients(backend, needs, through):
    """One input requires grad, one output is used."""
    tensors = inputs(21, 2, 1, 8, grad=False)
    for x, need in zip(tensors, needs, strict=True):
        x.requires_grad_(need)
    offset = torch.tensor([0], dtype=torch.int32)
    got = block_attention(*tensors, 4, offset, backend=backend)[through == "lse"][4:]
    want = literal(*tensors, 4, [0], [21])[through == "lse"][4:]
    x = tensors[needs.index(True)]
    up = torch.randn_like(got)
    grad = torch.autograd.grad(got, x, up)[0]
    if through == "lse" and needs[2]:
        assert grad.abs().max() < 1e-15
    else:
        torch.testing.assert_close(grad, torch.autograd.grad(want, x, up)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Expanded and transposed inputs give what their contiguous copies give."""
    offset = torch.tensor([1], dtype=torch.int32)
    q = torch.randn(4, 30, 8).transpose(0, 1)
    k = torch.randn(30, 1, 8).expand(30, 2, 8)
    v = torch.randn(30, 2, 16)[..., ::2]
    got = block_attention(q, k, v, 3, offset, backend=backend)
    want = block_attention(q.contiguous(), k.contiguous(), v.contiguous(), 3, offset, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [1, 5, 100, 300])
@pytest.mark.parametrize(
    "reach, lengths", [(None, [600]), (None, [300, 0, 17, 283]), (4, [600]), (257, [600]), (120, [300, 0, 17, 283])]
)
def test_cpu_in_several_blocks(window, reach, lengths):
    """Sequences longer than a block of rows, windows and reaches shorter and longer than one."""
    q, k, v = inputs(600, 4, 2, 8)
    offset = torch.tensor([i % 7 for i in range(len(lengths))], dtype=torch.int32)
    up, up_lse = torch.randn_like(q), torch.randn(600, 4, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        out, lse = block_attention(q, k, v, window, offset, packed(lengths), reach=reach, backend=backend)
        results.append((out, lse, *torch.autograd.grad((out, lse), (q, k, v), (up, up_lse))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def nothing_out_of_reach_is_read(backend, device, dtype, block) -> None:
    """NaN at the text's start and end spoils no row or key that is a reach and the borders of blocks, of `block` rows
    or keys at most, away."""
    rows = 8 * block
    q, k, v, up = (x.to(device, dtype) for x in (*inputs(rows, 4, 1, 64, grad=False), torch.randn(rows, 4, 64)))
    k[:block], v[:block], q[7 * block :], up[7 * block :] = [torch.nan] * 4
    leaves = [x.requires_grad_() for x in (q, k, v)]
    offset = torch.tensor([1], dtype=torch.int32, device=device)
    out, lse = block_attention(*leaves, 4, offset, reach=block // 2, backend=backend)
    dq, *of_keys = torch.autograd.grad((out, lse), leaves, (up, torch.ones_like(lse)))
    assert all(x[3 * block : 7 * block].isfinite().all() for x in (out, lse, dq))
    assert all(x[3 * block : 5 * block].isfinite().all() for x in of_keys)


def test_cpu_reads_nothing_out_of_reach():
    nothing_out_of_reach_is_read("cpu", "cpu", torch.float32, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_error_near_eager(dtype):
    """Against float64 the error is at most twice (gradients: three times) that of the dense reference."""
    exact = inputs(300, 4, 2, 64)
    tensors = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    offset, up = torch.tensor([3], dtype=torch.int32), torch.randn(300, 4, 64).to(dtype)

    def both(tensors, backend):
        out, lse = block_attention(*tensors, 5, offset, backend=backend)
        weights = up.to(out.dtype), torch.ones_like(lse)
        return out, *torch.autograd.grad((out, lse), tensors, weights)

    got, eager, want = both(tensors, "cpu"), both(tensors, "reference"), both(exact, "reference")
    for i in range(4):
        error, allowed = ((x[i].double() - want[i]).norm() / want[i].norm() for x in (got, eager))
        assert error <= (2 if i == 0 else 3) * max(allowed, torch.finfo(dtype).eps / 4)


def figure_2(length: int, window: int, offset: int) -> torch.Tensor:
    """Keys [true | draft] that each query sees, bool [T, 2T]: true keys before its window, drafts inside before it."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    start = torch.where(i >= offset, i - (i - offset) % window, 0)
    inside = (i >= offset) & (j >= start) & (j < i)
    return torch.cat([j < start, inside], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length, window, offset", [(24, 4, 0), (23, 4, 3), (26, 5, 1)])
def test_stage_2_in_one_pass(backend, length, window, offset):
    """One block_attention and window - 1 extend_attention calls are dense attention under figure 2's mask."""
    d, hq, hkv = 8, 4, 2
    q, k, v = inputs(length, hq, hkv, d)
    _, draft_k, draft_v = inputs(length, hq, hkv, d, seed=1)
    mask = figure_2(length, window, offset)

    out, lse = block_attention(q, k, v, window, torch.tensor([offset], dtype=torch.int32), backend=backend)
    outs, lses = list(out.split(1)), list(lse.split(1))
    starts = torch.arange(offset, length, window)
    for m in range(1, window):
        rows = starts[starts + m < length] + m
        own = rows[:, None] - m + torch.arange(m)
        merged = extend_attention(out[rows], lse[rows], q[rows], draft_k[own], draft_v[own], backend=backend)
        for r, o, s in zip(rows.tolist(), *(x.split(1) for x in merged), strict=True):
            outs[r], lses[r] = o, s
    out, lse = torch.cat(outs), torch.cat(lses)

    keys, values = (torch.cat(x).repeat_interleave(hq // hkv, 1) for x in ((k, draft_k), (v, draft_v)))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * d**-0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = mask.any(1)
    want = torch.einsum("hij,jhd->ihd", scores[:, seen].softmax(-1), values)
    torch.testing.assert_close(out[seen], want)
    torch.testing.assert_close(lse[seen], scores[:, seen].logsumexp(-1).T)
    assert not out[~seen].any()

    up, up_lse = torch.randn_like(want), torch.randn(seen.sum(), hq, dtype=torch.float64)
    leaves = q, k, v, draft_k, draft_v
    got = torch.autograd.grad((out[seen] * up).sum() + (lse[seen] * up_lse).sum(), leaves)
    loss = (want * up).sum() + (scores[:, seen].logsumexp(-1).T * up_lse).sum()
    for g, w in zip(got, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("short", [False, True])
def test_gradcheck(short):
    offset, cu = torch.tensor([0, 2], dtype=torch.int32), packed([7, 6])
    reach = 2 if short else None
    seen = torch.tensor([i >= 3 and i != 7 and i != 8 for i in range(13)])

    def both(q, k, v):
        out, lse = block_attention(q, k, v, 3, offset, cu, reach=reach, backend="reference")
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.isfinite(block_attention(*inputs(13, 2, 1, 4), 3, offset, cu)[1][seen]).any()
    assert torch.autograd.gradcheck(both, inputs(13, 2, 1, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reach", [None, 3])
def test_opcheck(backend, reach):
    q, k, v = inputs(13, 2, 1, 8, torch.float32)
    offset = torch.tensor([1, 2], dtype=torch.int32)
    opcheck(torch.ops.beagle.block_attention.default, (q, k, v, offset, packed([7, 6]), 3, 0.3, reach, backend))


@pytest.mark.parametrize("reach", [None, 5])
def test_compiles_in_one_graph(reach):
    def loss(q, k, v):
        out, lse = block_attention(q, k, v, 4, offset, reach=reach)
        return (out * 2).square().sum() + lse[4:].sum()

    offset = torch.tensor([0], dtype=torch.int32)
    tensors = inputs(19, 2, 1, 8, torch.float32)
    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_bad_inputs():
    q, k, v = inputs(8, 4, 2, 8, torch.float32)
    offset = torch.tensor([0], dtype=torch.int32)
    for args, error, message in [
        ((q, k, v, 0, offset), ValueError, "window is 0"),
        ((q, k, v.double(), 2, offset), TypeError, "v is float64"),
        ((q, k[:5], v, 2, offset), ValueError, r"k has shape \[5, 2, 8\]"),
        ((q[:, :3], k, v, 2, offset), ValueError, "3 query heads and 2 key heads"),
        ((q, k, v, 2, offset.long()), TypeError, "offset is int64"),
        ((q, k, v, 2, offset, packed([4, 4])), ValueError, r"cu_seqlens has shape \[3\]"),
        ((q.int(), k, v, 2, offset), TypeError, "q is int32"),
        ((q, k.to("meta"), v, 2, offset), ValueError, "k on meta"),
    ]:
        with pytest.raises(error, match=message):
            block_attention(*args)
    with pytest.raises(ValueError, match="reach is 0; allowed: 1 to .*, or None for no limit"):
        block_attention(q, k, v, 2, offset, reach=0)
    with pytest.raises(ValueError, match="cannot serve"):
        block_attention(q, k, v, 2, offset, backend="cuda")


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7])
def test_every_short_sequence_alone(window):
    """A sequence that fills the whole input, with every length and offset around the window's multiples."""
    for rows in range(1, 4 * window + 2):
        for offset in range(window):
            q, k, v = (torch.randn(rows, heads, 8) for heads in (2, 1, 1))
            start = torch.tensor([offset], dtype=torch.int32)
            out, lse = block_attention(q, k, v, window, start)
            want, want_lse = block_attention(q.double(), k.double(), v.double(), window, start, backend="reference")
            torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
            torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5, rtol=0)
