"""What the Triton ops must satisfy on any device: on a GPU directly, on the CPU in a process with the interpreter on.

`python triton_cases.py OP DTYPE` checks one op under the interpreter and prints how many cases it ran.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from block_cases import (
    BLOCK_CASES,
    check_block_attention,
    check_partial_and_strided,
    check_variants,
    check_what_is_out_of_reach,
)
from closeness import close_as_eager, random, score_rounding
from test_distill_loss import naive as naive_distill_loss
from test_extend_attention import inputs as extend_inputs
from test_tree_attention import case as tree_case
from test_tree_attention import paged, ring_case
from test_tree_attention_variants import VARIANTS, in_pages, variant
from test_tree_attention_variants import eager as eager_variant

from beagle_kernels import block_attention, distill_loss, extend_attention, tree_attention
from beagle_kernels.reference.tree_attention import visible_slots


def check_bounds_of_no_sequence(device: str, dtype: torch.dtype) -> int:
    """Row bounds outside the rows, offsets and windows of any size: what the reference makes of them."""
    gen, extremes = torch.Generator().manual_seed(6), (-(2**31), 2**31 - 1)
    q, k, v = (random((37, heads, 64), dtype, device, gen) for heads in (4, 1, 1))
    cases = [
        (5, [-3, extremes[0], extremes[1]], [-9, 10, 30, 99]),
        (2**40, [2, extremes[0], 4], [0, 5, 10, 37]),
        (3, [extremes[1]], None),
    ]
    for window, offsets, bounds in cases:
        offset = torch.tensor(offsets, dtype=torch.int32, device=device)
        cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        like_reference(lambda *x, **b: block_attention(*x, window, offset, cu, **b), q, k, v, what=f"{bounds}")  # noqa: B023
    lengths = torch.tensor([-7, extremes[0], extremes[1]], dtype=torch.int32, device=device)
    q = random((3, 4, 4, 64), dtype, device, gen)
    k, v = (random((3, 1, 40, 64), dtype, device, gen) for _ in range(2))
    mask = torch.full((3, 4, 1), 5, dtype=torch.int64, device=device)
    for scale in (0.3, -0.3, 0.0):
        op = partial(tree_attention, lengths=lengths, mask=mask, scale=scale)
        like_reference(lambda *x, **b: (op(*x, **b),), q, k, v, what=f"scale {scale}")  # noqa: B023
    return len(cases) + 1


def like_reference(op, q, k, v, what: str) -> None:
    """As close to the reference in float64 as the reference in the tensors' own precision is."""
    got, eager = op(q, k, v, backend="triton"), op(q, k, v, backend="reference")
    # the reference holds everything in fp32: 16-bit weights are rounded once more
    rounding = max(score_rounding(q, k), torch.finfo(q.dtype).eps / 2)
    for have, near, exact in zip(got, eager, op(*(x.double() for x in (q, k, v)), backend="reference"), strict=True):
        seen = exact > float("-inf")
        assert torch.equal(have > float("-inf"), seen), what
        close_as_eager(have[seen], near[seen], exact[seen], 2, what, rounding)


def eager_extend(out, lse, q, k, v):
    group = q.shape[1] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("rhd,rmhd->rhm", q, k) * q.shape[-1] ** -0.5
    scores = torch.cat([lse.to(torch.promote_types(scores.dtype, torch.float32))[..., None], scores], -1)
    weights = scores.softmax(-1).to(q.dtype)
    return weights[..., :1] * out + torch.einsum("rhm,rmhd->rhd", weights[..., 1:], v), scores.logsumexp(-1)


def check_extend_attention(device: str, dtype: torch.dtype) -> int:
    # rows, extra keys, query heads, key heads, head size
    cases = [
        (0, 3, 4, 1, 64),
        (1, 2, 4, 1, 64),
        (5, 0, 4, 1, 64),
        (17, 1, 4, 1, 64),
        (33, 3, 8, 1, 40),
        (9, 16, 4, 2, 128),
    ]
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
            rounding = score_rounding(leaves[2], leaves[3])
            close_as_eager(got, results[0][i], results[1][i], 2 if i < 2 else 3, f"{what} {name}", rounding)
    return len(cases)


def eager_tree(q, k, v, lengths, mask):
    visible = visible_slots(k.shape[2], lengths, mask)
    group, unused = q.shape[2] // k.shape[1], ~visible.any(1)[:, None, :, None]
    k, v = (x.masked_fill(unused, 0.0).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("bnhd,bhsd->bhns", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhns,bhsd->bnhd", scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1), v)


TREE_CASES = {
    # nodes, query heads, key heads, head size, longest prefix
    "few nodes": [(1, 4, 1, 64, 300), (4, 4, 1, 64, 20)],
    "any heads": [(7, 8, 1, 40, 70), (16, 4, 2, 128, 20)],
    "wide heads, many words": [(66, 2, 2, 256, 20)],
    "large, few nodes": [(1, 4, 1, 64, 5000), (16, 4, 1, 64, 5000)],
    "large, any heads": [(16, 4, 2, 128, 5000), (66, 2, 2, 256, 5000)],
    "large, many words": [(1024, 4, 1, 64, 5000)],
}


def check_tree_attention(device: str, dtype: torch.dtype, group: str) -> int:
    """What no node sees, pages included, holds NaN."""
    for n, hq, hkv, d, longest in TREE_CASES[group]:
        what, page = f"{dtype} {(n, hq, hkv, d)}", 16
        args, _ = tree_case(nodes=n, hq=hq, hkv=hkv, d=d, prefix=(0, 63, longest), slack=page, dtype=dtype)
        q, k, v, lengths, mask = (x.to(device) for x in args)
        spread = torch.stack([lengths, lengths * 0], 1)[:, 0]
        got = tree_attention(q, k, v, spread, mask, backend="triton")
        exact = eager_tree(q.double(), k.double(), v.double(), lengths, mask)
        close_as_eager(got, eager_tree(q, k, v, lengths, mask), exact, 2, what, score_rounding(q, k))
        slots = k.shape[2] // page * page
        order = torch.randperm(3 * slots // page + 2, generator=torch.Generator().manual_seed(n))[: 3 * slots // page]
        pages = (paged(x[:, :, :slots], page, 2, order.to(device)) for x in (k, v))
        table = order.view(3, -1).int().to(device)
        in_pages = tree_attention(q, *pages, lengths, mask, block_table=table, backend="triton")
        assert torch.equal(got, in_pages), what
        if n == 4:
            # as where the rows alone fill the device, so that the only split writes the output
            with mock.patch("beagle_kernels.triton.tree_attention.running_at_once", lambda *args: 1):
                assert torch.equal(got, tree_attention(q, k, v, spread, mask, backend="triton")), what
        for ring in (263, 1031) if n == 4 else ():  # a window of keys: one split, and several
            q, k, v, lengths, mask = (x.to(device) for x in ring_case(n, hq, hkv, d, ring, dtype)[0])
            got = tree_attention(q, k, v, lengths, mask, backend="triton")
            exact = eager_tree(q.double(), k.double(), v.double(), lengths, mask)
            close_as_eager(got, eager_tree(q, k, v, lengths, mask), exact, 2, what, score_rounding(q, k))
    nothing = tree_attention(q, k, v, lengths * 0, mask * 0, backend="triton")
    assert not nothing.any()
    return len(TREE_CASES[group])


def check_combining(device: str, dtype: torch.dtype) -> int:
    """As many splits as each size of tile takes, and of one row fewer in use: what the others hold is NaN."""
    from beagle_kernels.triton.tree_combine import TILES, combine
    from beagle_kernels.triton.tree_splits import MIN_KEYS

    counts = [count for size in TILES for count in (size - 1, size)]
    for splits in counts:
        part = torch.randn(2, 1, 3, splits, 40, generator=torch.Generator().manual_seed(splits)).to(device)
        lse, in_use = 4 * part[..., 0].contiguous(), torch.tensor([splits, splits - 3])
        part[1, :, :, splits - 3 :] = lse[1, :, :, splits - 3 :] = torch.nan
        lengths, out = (in_use * MIN_KEYS.value).int().to(device), torch.empty(2, 1, 3, 40, device=device)
        combine(part, lse, lengths, None, None, out, 1 << 20, 1, 0)
        for row, used in enumerate(in_use.tolist()):
            weight = lse[row, :, :, :used].double().softmax(-1)
            want = (weight[..., None] * part[row, :, :, :used].double()).sum(-2).float()
            torch.testing.assert_close(out[row], want, msg=f"{splits} splits")
    return len(counts)


VARIANT_CASES = {
    # nodes, query heads, key heads, widths of keys and values, longest prefix
    "windows, sinks, caps": [(5, 4, 2, 40, 24, 300)],
    "wide keys": [(2, 2, 1, 192, 128, 70)],
    "large, windows, sinks, caps": [(16, 8, 2, 128, 128, 5000), (60, 8, 1, 64, 128, 5000), (70, 4, 1, 192, 128, 3000)],
}


def check_tree_variants(device: str, dtype: torch.dtype, group: str) -> int:
    """Each alone and all together, dense and in pages of which those that nobody sees have no true id."""
    for n, hq, hkv, d, dv, longest in VARIANT_CASES[group]:
        for name in ("all",) if group == "wide keys" else VARIANTS:
            what = f"{dtype} {(n, hq, hkv, d, dv)} {name}"
            args, more, _ = variant(VARIANTS[name], d, dv, n, hq, hkv, longest, dtype)
            q, k, v, lengths, mask = (x.to(device) for x in args)
            more = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in more.items()}
            got = tree_attention(q, k, v, lengths, mask, **more, backend="triton")
            exact = eager_variant(q.double(), k.double(), v.double(), lengths, mask, **more)
            near = eager_variant(q, k, v, lengths, mask, **more)
            close_as_eager(got, near, exact, 2, what, score_rounding(q, k))
            first = args[3], args[4], None if name not in ("starts", "all") else more["starts"].cpu()
            *pages, table = (x.to(device) for x in in_pages(args[1], args[2], visible_slots(k.shape[2], *first)))
            spread = {key: x.repeat(2, 1).t()[:, 0] if key == "sinks" else x for key, x in more.items()}
            again = tree_attention(q, *pages, lengths, mask, block_table=table, **spread, backend="triton")
            assert torch.equal(got, again), what
        # windows that begin all over the prefix: blocks that some nodes see and others do not, in every split
        args, _, _ = variant((), d, dv, n, hq, hkv, longest, dtype)
        q, k, v, lengths, mask = (x.to(device) for x in args)
        spread_out = (torch.arange(n, device=device) * longest // n).expand(3, -1).int()
        given = q, k, v, lengths, mask, spread_out
        got = tree_attention(*given[:5], starts=spread_out, backend="triton")
        exact = eager_variant(*(x.double() if x.is_floating_point() else x for x in given))
        close_as_eager(got, eager_variant(*given), exact, 2, f"{dtype} {n} spread", score_rounding(q, k))
    odd = torch.full((hq,), torch.inf, device=device)
    assert not tree_attention(q, k, v, lengths, mask, **more | {"sinks": odd}, backend="triton").any()
    hidden = spread_out * 0 + 2**31 - 1
    assert not tree_attention(q, k, v, lengths, mask, starts=hidden, sinks=odd * torch.nan, backend="triton").any()
    return len(VARIANT_CASES[group])


def check_distill_loss(device: str, dtype: torch.dtype) -> int:
    """Several chunks, several blocks of the vocabulary, rows of weight zero, peaky logits."""
    cases = [(0, 16, 50, 1), (1, 16, 1, 1), (20, 24, 113, 1), (33, 16, 5008, 1), (9, 32, 1025, 20)]
    for rows, width, vocab, sharp in cases:
        what, gen = f"{dtype} {(rows, width, vocab, sharp)}", torch.Generator().manual_seed(rows)
        student = random((rows, width), dtype, device, gen).requires_grad_()
        teacher = random((rows, width), dtype, device, gen)
        weight = random((vocab, width), dtype, device, gen, sharp * width**-0.5)
        row_weight = random((rows,), torch.float32, device, gen).relu()
        got = distill_loss(student, teacher, weight, row_weight, backend="triton")
        grad = torch.autograd.grad(got, student)[0]
        alone = distill_loss(student.detach(), teacher, weight, row_weight, backend="triton")
        assert torch.equal(got.detach(), alone), what
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
    "block_attention": {group: partial(check_block_attention, group=group) for group in BLOCK_CASES}
    | {
        "some inputs, any strides": check_partial_and_strided,
        "bounds of no sequence": check_bounds_of_no_sequence,
        "out of reach": check_what_is_out_of_reach,
        "variants": check_variants,
    },
    "extend_attention": {"all": check_extend_attention},
    "tree_attention": {group: partial(check_tree_attention, group=group) for group in TREE_CASES}
    | {group: partial(check_tree_variants, group=group) for group in VARIANT_CASES}
    | {"splits combined": check_combining},
    "distill_loss": {"all": check_distill_loss},
}
"""By op and group of cases, each of few kernels: those named large are for a GPU."""


@contextmanager
def little_memory():
    """Inside, the logits of the loss are computed in several chunks."""
    from beagle_kernels.triton import distill_loss as module

    with mock.patch.object(module, "BUDGET", 1 << 18):
        yield


def small_tiles() -> None:
    """Tiles so small that small sizes reach every loop."""
    from beagle_kernels.triton import configs

    for by_arch in (*configs.TABLE.values(), *configs.FLOAT32.values()):
        for by_size in by_arch.values():
            by_size.update({size: configs.Config(32, 32, 4, 1) for size in by_size})


def main(op: str, dtype: str) -> None:
    torch.set_num_threads(1)
    # Uninitialised memory becomes NaN: what a kernel fails to write shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    small_tiles()
    from beagle_kernels.triton import distill_loss as module

    module.BLOCK = 256
    with little_memory():
        small = [check for group, check in CHECKS[op].items() if not group.startswith("large")]
        print(sum(check("cpu", getattr(torch, dtype)) for check in small))


if __name__ == "__main__":
    main(*sys.argv[1:])
