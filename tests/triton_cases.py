"""What the Triton ops must satisfy on any device: on a GPU directly, on the CPU in a process with the interpreter on.

`python triton_cases.py OP DTYPE` checks one op under the interpreter and prints how many cases it ran.
"""

from __future__ import annotations

import sys

import torch
from test_block_attention import packed
from test_distill_loss import naive as naive_distill_loss
from test_extend_attention import inputs as extend_inputs
from test_tree_attention import case as tree_case
from test_tree_attention import paged

from beagle_kernels import block_attention, distill_loss, extend_attention, tree_attention
from beagle_kernels.reference.block_attention import visible_keys
from beagle_kernels.reference.tree_attention import visible_slots

BLOCK_CASES = [
    # window, offsets, lengths (None: one sequence), rows, query heads, key heads, head size, sharpness
    (5, [0], None, 0, 2, 1, 32, 1),
    (5, [0], None, 1, 2, 1, 32, 1),
    (5, [2], None, 63, 4, 4, 64, 1),
    (5, [-3], None, 63, 8, 1, 40, 8),
    (4, [1, 0, 3, 2, 9, 0], [13, 0, 50, 30, 1, 0], 113, 4, 1, 32, 1),
    (32, [3, 20], [60, 23], 90, 2, 2, 16, 1),
]
LARGE_BLOCK_CASES = [
    (5, [3], None, 1025, 8, 2, 128, 1),
    (3, [1, 2, 0], [600, 25, 400], 1025, 4, 1, 256, 4),
    (7, [0, 3], [1000, 1000], 2048, 8, 8, 80, 1),
]


def random(shape, dtype, device, gen, scale=1.0):
    return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(device, dtype)


def close_as_eager(got, eager, exact, factor: float, what: str) -> None:
    """Error against float64 at most `factor` times eager PyTorch's, or than what rounding the result costs."""
    for name, size in (("largest", lambda x: x.abs().amax()), ("rms", lambda x: x.square().mean().sqrt())):
        if exact.numel() == 0:
            assert got.shape == exact.shape
            continue
        floor = max(size(exact.to(got.dtype).double() - exact), torch.finfo(got.dtype).eps / 2 * size(exact))
        allowed = factor * max(size(eager.double() - exact), floor)
        error = size(got.double() - exact)
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"


def eager_block(q, k, v, mask):
    """Dense attention in the inputs' own precision; rows without a key are left out of the comparison."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~mask.any(1)[:, None], 0.0)
    weights = scores.softmax(-1).masked_fill(~mask.any(1)[:, None], 0.0)
    accurate = torch.promote_types(scores.dtype, torch.float32)
    return torch.einsum("hij,jhd->ihd", weights, v), scores.to(accurate).logsumexp(-1).T


def check_block_attention(device: str, dtype: torch.dtype, cases=BLOCK_CASES) -> int:
    for window, offsets, lengths, rows, hq, hkv, d, sharp in cases:
        what = f"{dtype} {(window, offsets, lengths, rows, hq, hkv, d, sharp)}"
        gen = torch.Generator().manual_seed(rows)
        offset = torch.tensor(offsets, dtype=torch.int32, device=device)
        cu = None if lengths is None else torch.stack([packed(lengths), packed(lengths) * 0], 1)[:, 0].to(device)
        leaves = [
            random((rows, heads, d), dtype, device, gen, scale).requires_grad_()
            for heads, scale in ((hq, sharp), (hkv, 1), (hkv, 1))
        ]
        out, lse = block_attention(*leaves, window, offset, cu, backend="triton")
        up = random(out.shape, dtype, device, gen), random(lse.shape, torch.float32, device, gen)
        grads = torch.autograd.grad((out, lse), leaves, up, retain_graph=True)
        repeated = torch.autograd.grad((out, lse), leaves, up)
        assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True)), what
        if rows == 0:
            continue
        first, end = visible_keys(rows, window, offset, cu)
        key = torch.arange(rows, device=device)
        mask = (key >= first[:, None]) & (key < end[:, None])
        seen = mask.any(1)
        assert torch.equal(lse > float("-inf"), seen[:, None].expand_as(lse)) and not out[~seen].any(), what
        exact = [x.detach().double().requires_grad_() for x in leaves]
        results = []
        for tensors in (leaves, exact):
            o, z = eager_block(*tensors, mask)
            h = (up[1] * seen[:, None]).to(z.dtype)
            results.append([o, z, *torch.autograd.grad((o, z), tensors, (up[0].to(o.dtype), h))])
        eager, exact = results
        for i, (name, got) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True)):
            pick = seen if i < 2 else slice(None)
            close_as_eager(got[pick], eager[i][pick], exact[i][pick], 2 if i < 2 else 3, f"{what} {name}")
    return len(cases)


def check_partial_and_strided(device: str, dtype: torch.dtype) -> int:
    """One input requires grad, one output is used, strides are odd: the same numbers as the plain call."""
    gen, offset = torch.Generator().manual_seed(5), torch.tensor([1], dtype=torch.int32, device=device)
    q, k, v = (random((40, heads, 32), dtype, device, gen) for heads in (4, 2, 2))
    up = random(q.shape, dtype, device, gen)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(block_attention(*full, 4, offset, backend="triton")[0], full, up)
    odd = q.transpose(0, 1).contiguous().transpose(0, 1), k[:, :1].expand(40, 2, 32), torch.stack([v, v], -1)[..., 0]
    same = block_attention(q, k[:, :1].repeat(1, 2, 1), v, 4, offset, backend="triton")
    for got, expected in zip(block_attention(*odd, 4, offset, backend="triton"), same, strict=True):
        assert torch.equal(got, expected)
    for i in range(3):
        tensors = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        got = torch.autograd.grad(block_attention(*tensors, 4, offset, backend="triton")[0], tensors[i], up)[0]
        assert torch.equal(got, want[i])
    return 4


def check_bounds_of_no_sequence(device: str, dtype: torch.dtype) -> int:
    """Row bounds outside the rows, offsets and windows of any size: what the reference makes of them."""
    gen, extremes = torch.Generator().manual_seed(6), (-(2**31), 2**31 - 1)
    q, k, v = (random((37, heads, 16), dtype, device, gen) for heads in (2, 1, 1))
    cases = [
        (5, [-3, extremes[0], extremes[1]], [-9, 10, 30, 99]),
        (2**40, [2, extremes[0], 4], [0, 5, 10, 37]),
        (3, [extremes[1]], None),
    ]
    for window, offsets, bounds in cases:
        offset = torch.tensor(offsets, dtype=torch.int32, device=device)
        cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        got = block_attention(q, k, v, window, offset, cu, backend="triton")
        want = block_attention(q, k, v, window, offset, cu, backend="reference")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=0.01 if dtype != torch.float32 else 1e-5, rtol=0)
    lengths = torch.tensor([-7, extremes[0], extremes[1]], dtype=torch.int32, device=device)
    q = random((3, 5, 2, 16), dtype, device, gen)
    k, v = (random((3, 1, 40, 16), dtype, device, gen) for _ in range(2))
    mask = torch.full((3, 5, 1), 5, dtype=torch.int64, device=device)
    for scale in (0.3, -0.3, 0.0):
        got, want = (tree_attention(q, k, v, lengths, mask, scale=scale, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(got, want, atol=0.01 if dtype != torch.float32 else 1e-5, rtol=0)
    return len(cases) + 1


def check_reading_by_tma(device: str, dtype: torch.dtype) -> int:
    """Tensor descriptors give what pointers give, where the tensors let them read."""
    from beagle_kernels.triton import configs
    from beagle_kernels.triton.block_attention import _readable_by_tma

    gen, count = torch.Generator().manual_seed(8), 0
    offset, cu = torch.tensor([1, 3], dtype=torch.int32, device=device), packed([100, 61]).to(device)
    wide = random((171, 6, 64), dtype, device, gen)
    for q, k, v in (wide.tensor_split((4, 5), 1), [random((161, 2, 32), dtype, device, gen) for _ in range(3)]):
        assert all(map(_readable_by_tma, (q, k, v))) and not _readable_by_tma(v[..., 1:])
        results, up = [], random(q.shape, dtype, device, gen)
        keys = [(name, 90, max(16, q.shape[2]), dtype) for name in ("block_forward", "block_dq", "block_dkv")]
        for tma in (False, True):
            configs._tuned.update(dict.fromkeys(keys, configs.Config(64, 32, 4, 2, tma)))
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = block_attention(*leaves, 4, offset, cu, backend="triton")
            results.append((out, lse, *torch.autograd.grad(out, leaves, up)))
        for key in keys:
            del configs._tuned[key]
        torch.testing.assert_close(*results)
        count += 1
    return count


def eager_extend(out, lse, q, k, v):
    group = q.shape[1] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("rhd,rmhd->rhm", q, k) * q.shape[-1] ** -0.5
    scores = torch.cat([lse.to(torch.promote_types(scores.dtype, torch.float32))[..., None], scores], -1)
    weights = scores.softmax(-1).to(q.dtype)
    return weights[..., :1] * out + torch.einsum("rhm,rmhd->rhd", weights[..., 1:], v), scores.logsumexp(-1)


def check_extend_attention(device: str, dtype: torch.dtype) -> int:
    # rows, extra keys, query heads, key heads, head size
    cases = [(0, 3, 4, 2, 8), (1, 1, 1, 1, 16), (5, 0, 2, 1, 8), (17, 4, 4, 1, 64), (33, 3, 8, 1, 40), (9, 16, 4, 4, 8)]
    for rows, m, hq, hkv, d in cases:
        what, gen = f"{dtype} {(rows, m, hq, hkv, d)}", torch.Generator().manual_seed(rows)
        leaves = [x.detach().to(device).requires_grad_() for x in extend_inputs(rows, m, hq, hkv, d, dtype)]
        out, lse = extend_attention(*leaves, backend="triton")
        up = random(out.shape, dtype, device, gen), random(lse.shape, torch.float32, device, gen)
        grads = torch.autograd.grad((out, lse), leaves, up, retain_graph=True)
        repeated = torch.autograd.grad((out, lse), leaves, up)
        assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True)), what
        if rows == 0 or m == 0:
            assert torch.equal(out, leaves[0]) and torch.equal(lse, leaves[1]), what
            continue
        exact = [x.detach().double().requires_grad_() for x in leaves]
        results = []
        for tensors in (leaves, exact):
            o, z = eager_extend(*tensors)
            results.append([o, z, *torch.autograd.grad((o, z), tensors, (up[0].to(o.dtype), up[1].to(z.dtype)))])
        names = "out", "lse", "d out", "d lse", "dq", "dk", "dv"
        for i, (name, got) in enumerate(zip(names, (out, lse, *grads), strict=True)):
            close_as_eager(got, results[0][i], results[1][i], 2 if i < 2 else 3, f"{what} {name}")
    return len(cases)


def eager_tree(q, k, v, lengths, mask):
    visible = visible_slots(k.shape[2], lengths, mask)
    group, unused = q.shape[2] // k.shape[1], ~visible.any(1)[:, None, :, None]
    k, v = (x.masked_fill(unused, 0.0).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("bnhd,bhsd->bhns", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhns,bhsd->bnhd", scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1), v)


TREE_CASES = [(1, 4, 1, 32, 300), (7, 8, 1, 40, 70), (66, 2, 2, 16, 64)]
LARGE_TREE_CASES = [(n, *heads, 5000) for n in (1, 16, 1024) for heads in ((8, 2, 128), (4, 4, 64), (8, 1, 256))]


def check_tree_attention(device: str, dtype: torch.dtype, cases=TREE_CASES) -> int:
    """Nodes, query heads, key heads, head size, longest prefix. What no node sees, pages included, holds NaN."""
    for n, hq, hkv, d, longest in cases:
        what, page = f"{dtype} {(n, hq, hkv, d)}", 16
        args, _ = tree_case(nodes=n, hq=hq, hkv=hkv, d=d, prefix=(0, 63, longest), slack=page, dtype=dtype)
        q, k, v, lengths, mask = (x.to(device) for x in args)
        spread = torch.stack([lengths, lengths * 0], 1)[:, 0]
        got = tree_attention(q, k, v, spread, mask, backend="triton")
        exact = eager_tree(q.double(), k.double(), v.double(), lengths, mask)
        close_as_eager(got, eager_tree(q, k, v, lengths, mask), exact, 2, what)
        slots = k.shape[2] // page * page
        order = torch.randperm(3 * slots // page + 2, generator=torch.Generator().manual_seed(n))[: 3 * slots // page]
        pages = (paged(x[:, :, :slots], page, 2, order.to(device)) for x in (k, v))
        table = order.view(3, -1).int().to(device)
        assert torch.equal(got, tree_attention(q, *pages, lengths, mask, block_table=table, backend="triton")), what
    nothing = tree_attention(q, k, v, lengths * 0, mask * 0, backend="triton")
    assert not nothing.any()
    return len(cases)


def check_distill_loss(device: str, dtype: torch.dtype) -> int:
    """Several chunks, several blocks of the vocabulary, rows of weight zero, peaky logits."""
    cases = [(0, 16, 50, 1), (1, 16, 1, 1), (20, 24, 113, 1), (33, 16, 5000, 1), (9, 32, 1025, 20)]
    for rows, width, vocab, sharp in cases:
        what, gen = f"{dtype} {(rows, width, vocab, sharp)}", torch.Generator().manual_seed(rows)
        student = random((rows, width), dtype, device, gen).requires_grad_()
        teacher = random((rows, width), dtype, device, gen)
        weight = random((vocab, width), dtype, device, gen, sharp * width**-0.5)
        row_weight = random((rows,), torch.float32, device, gen).relu()
        got = distill_loss(student, teacher, weight, row_weight, backend="triton")
        grad = torch.autograd.grad(got, student)[0]
        assert torch.equal(got.detach(), distill_loss(student.detach(), teacher, weight, row_weight, backend="triton"))
        if not row_weight.any():
            assert got == 0 and not grad.any(), what
            continue
        results = []
        for acc, kind in ((dtype, torch.float32), (torch.float64, torch.float64)):
            leaf, *rest = (x.detach().to(acc) for x in (student, teacher, weight))
            value = naive_distill_loss(leaf.requires_grad_(), *rest, row_weight.to(kind))
            results.append((value, torch.autograd.grad(value, leaf)[0]))
        close_as_eager(grad, results[0][1], results[1][1], 3, f"{what} gradient")
        close_as_eager(got[None], results[0][0][None], results[1][0][None], 2, f"{what} loss")
    return len(cases)


CHECKS = {
    "distill_loss": (check_distill_loss,),
    "block_attention": (
        check_block_attention, check_partial_and_strided, check_bounds_of_no_sequence, check_reading_by_tma,
    ),
    "extend_attention": (check_extend_attention,),
    "tree_attention": (check_tree_attention,),
}


def small_tiles() -> None:
    """Tiles so small that small sizes reach every loop."""
    from beagle_kernels.triton import configs

    for by_arch in configs.TABLE.values():
        for by_size in by_arch.values():
            by_size.update({size: configs.Config(32, 32, 4, 1) for size in by_size})


def main(op: str, dtype: str) -> None:
    torch.set_num_threads(1)
    # Uninitialised memory becomes NaN: what a kernel fails to write shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    small_tiles()
    from beagle_kernels.triton import distill_loss as module

    module.BUDGET, module.BLOCK = 1 << 18, 256
    print(sum(check("cpu", getattr(torch, dtype)) for check in CHECKS[op]))


if __name__ == "__main__":
    main(*sys.argv[1:])
