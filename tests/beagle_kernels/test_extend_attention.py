"""extend_attention: merging a row's own keys equals one softmax over old and new keys together."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from beagle_kernels.extend_attention import extend_attention

BACKENDS = ["reference", "cpu"]


def inputs(rows: int, m: int, hq: int, hkv: int, d: int, dtype=torch.float64, grad: bool = True, seed: int = 0):
    """out, lse, q, k, v; row 0 has no old key."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (rows, hq, d), (rows, hq), (rows, hq, d), (rows, m, hkv, d), (rows, m, hkv, d)
    tensors = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]
    tensors[0][:1], tensors[1][:1] = 0.0, float("-inf")
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(lse_dtype if x.dim() == 2 else dtype).requires_grad_(grad) for x in tensors]


def dense(old_k, old_v, q, k, v, has_old):
    """Attention of each row over its old keys [R, n, Hkv, D] and its extra ones, and over the old ones alone."""
    group = q.shape[1] // k.shape[2]
    keys, values = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
    scores = torch.einsum("rhd,rmhd->rhm", q, keys.repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    hidden = torch.arange(scores.shape[-1]) < old_k.shape[1]
    old, scores = scores[..., : old_k.shape[1]], scores.masked_fill(hidden & ~has_old[:, None, None], float("-inf"))

    def attend(scores, values):
        values = values.repeat_interleave(group, 2)
        return torch.einsum("rhm,rmhd->rhd", scores.softmax(-1), values), scores.logsumexp(-1)

    out, lse = attend(old, old_v)
    out, lse = torch.where(has_old[:, None, None], out, 0.0), torch.where(has_old[:, None], lse, float("-inf"))
    return attend(scores, values), (out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, m, hq, hkv", [(1, 1, 1, 1), (9, 4, 4, 1), (63, 3, 4, 2), (5, 16, 8, 8), (7, 1, 8, 1)])
def test_equals_one_softmax(backend, rows, m, hq, hkv):
    d, gen = 8, torch.Generator().manual_seed(rows)
    *_, q, k, v = inputs(rows, m, hq, hkv, d)
    old_k, old_v = (torch.randn(rows, 6, hkv, d, generator=gen, dtype=torch.float64) for _ in range(2))
    old_k.requires_grad_(), old_v.requires_grad_()
    has_old = torch.arange(rows) % 3 != 1
    (want, want_lse), (out, lse) = dense(old_k, old_v, q, k, v, has_old)
    got, got_lse = extend_attention(out, lse, q, k, v, backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse)
    up, up_lse = torch.randn_like(want), torch.randn_like(want_lse)
    leaves = q, k, v, old_k, old_v
    got_grads = torch.autograd.grad((got, got_lse), leaves, (up, up_lse), retain_graph=True)
    for g, w in zip(got_grads, torch.autograd.grad((want, want_lse), leaves, (up, up_lse)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_merge(backend):
    """Without extra keys the old result comes back, as a copy; without rows nothing does."""
    out, lse, q, k, v = inputs(5, 0, 4, 2, 8)
    got, got_lse = extend_attention(out, lse, q, k, v, backend=backend)
    assert torch.equal(got, out) and torch.equal(got_lse, lse) and got.data_ptr() != out.data_ptr()
    up = torch.randn_like(out)
    grads = torch.autograd.grad(got, (out, q, k), up)
    assert torch.equal(grads[0][1:], up[1:]) and not grads[1].any() and grads[2].shape == k.shape
    got, got_lse = extend_attention(*inputs(0, 3, 4, 2, 8), backend=backend)
    assert got.shape == (0, 4, 8) and got_lse.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_old_keys(backend):
    """What stands in its out is ignored, NaN too, and no gradient reaches it."""
    tensors = inputs(4, 2, 2, 1, 8)
    with torch.no_grad():
        tensors[0][0] = float("nan")
    got, lse = extend_attention(*tensors, backend=backend)
    assert torch.isfinite(got).all() and torch.isfinite(lse).all()
    grads = torch.autograd.grad(got.sum() + lse.sum(), tensors)
    assert all(torch.isfinite(g).all() for g in grads) and not grads[0][0].any() and not grads[1][0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(5))
def test_one_input_requires_grad(backend, which):
    tensors = inputs(6, 3, 4, 2, 8, grad=False)
    tensors[which].requires_grad_()
    full = inputs(6, 3, 4, 2, 8)
    up = torch.randn_like(full[0])
    got = torch.autograd.grad(extend_attention(*tensors, backend=backend)[0], tensors[which], up)[0]
    want = torch.autograd.grad(extend_attention(*full, backend="reference")[0], full, up)[which]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    out, lse, q, k, v = inputs(6, 3, 4, 1, 8, torch.float32, grad=False)
    strided = out.transpose(0, 1).contiguous().transpose(0, 1), lse.T.contiguous().T, q.flip(0).flip(0)
    wide = k.expand(6, 3, 2, 8), v.expand(6, 3, 2, 8)
    want = extend_attention(out, lse, q, *(x.contiguous() for x in wide), backend=backend)
    torch.testing.assert_close(extend_attention(*strided, *wide, backend=backend), want)


def test_gradcheck():
    out, lse, q, k, v = (x.detach()[1:].requires_grad_() for x in inputs(5, 2, 4, 2, 4))
    assert torch.autograd.gradcheck(lambda *x: extend_attention(*x, backend="reference"), (out, lse, q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    args = (*inputs(5, 2, 4, 2, 8, torch.float32), 0.3, backend)
    opcheck(torch.ops.beagle.extend_attention.default, args)


def test_compiles_in_one_graph():
    def loss(*tensors):
        out, lse = extend_attention(*tensors)
        return (out * 2).square().sum() + lse.sum()

    tensors = inputs(6, 3, 4, 2, 8, torch.float32)
    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_bad_inputs():
    out, lse, q, k, v = inputs(6, 3, 4, 2, 8, torch.float32)
    for args, error, message in [
        ((out[:5], lse, q, k, v), ValueError, r"out has shape \[5, 4, 8\]"),
        ((out, lse.double(), q, k, v), TypeError, "lse is float64"),
        ((out, lse, q, k[0], v), ValueError, r"k has shape \[3, 2, 8\]"),
        ((out, lse, q, k, v[:, :2]), ValueError, r"v has shape \[6, 2, 2, 8\]"),
        ((out[:, :3], lse[:, :3], q[:, :3], k, v), ValueError, "3 query heads and 2 key heads"),
        ((out, lse, q.half(), k, v), TypeError, "out is float32; allowed: float16"),
    ]:
        with pytest.raises(error, match=message):
            extend_attention(*args)
