"""What block_attention must satisfy in Triton on any device: part of triton_cases, which says how it is used."""

from __future__ import annotations

from unittest import mock

import torch
from closeness import close_as_eager, random, score_rounding
from test_block_attention import nothing_out_of_reach_is_read, packed

from beagle_kernels import block_attention
from beagle_kernels.reference.block_attention import visible_keys

# What a kernel is compiled for, heads, group and head size, is one of four in every table: a GPU's tests compile each
# kernel once or twice, and what is large reuses what was compiled for the small.
BLOCK_CASES = {
    # window, reach, offsets, lengths (None: one sequence), rows, query heads, key heads, head size, sharpness
    "one sequence": [
        (5, None, [0], None, 0, 4, 1, 64, 1),
        (5, None, [0], None, 1, 4, 1, 64, 1),
        (5, None, [2], None, 63, 4, 1, 64, 1),
        (5, None, [-3], None, 63, 8, 1, 40, 8),
    ],
    "packed": [
        (4, None, [1, 0, 3, 2, 9, 0], [13, 0, 50, 30, 1, 0], 113, 4, 1, 64, 1),
        (32, None, [3, 20], [60, 23], 90, 4, 2, 128, 1),
    ],
    "within a reach": [
        (5, 1, [2], None, 40, 4, 1, 64, 1),
        (5, 30, [2], None, 70, 4, 1, 64, 1),
        (4, 4, [1, 0, 3], [13, 0, 50], 63, 4, 1, 64, 4),
        (3, 70, [1, 2], [103, 9], 112, 4, 1, 64, 1),
    ],
    "wide heads": [(3, None, [1], None, 63, 2, 2, 256, 4)],
    "large, one sequence": [(5, None, [3], None, 1025, 4, 1, 64, 1), (9, None, [0], None, 1025, 8, 1, 40, 8)],
    "large, packed": [
        (3, None, [1, 2, 0], [600, 25, 400], 1025, 4, 1, 64, 4),
        (7, None, [0, 3], [1000, 1000], 2048, 4, 2, 128, 1),
    ],
    "large, within a reach": [
        (5, 300, [3], None, 1025, 4, 1, 64, 1),
        (3, 129, [1, 2, 0], [600, 25, 400], 1025, 4, 1, 64, 4),
        (3, 2, [1, 2, 0], [600, 25, 400], 1025, 4, 1, 64, 1),
    ],
    "large, wide heads": [(3, None, [1], None, 1025, 2, 2, 256, 4)],
}


def eager_block(q, k, v, mask):
    """Dense attention in the inputs' own precision; rows without a key are left out of the comparison."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~mask.any(1)[:, None], 0.0)
    weights = scores.softmax(-1).masked_fill(~mask.any(1)[:, None], 0.0)
    accurate = torch.promote_types(scores.dtype, torch.float32)
    return torch.einsum("hij,jhd->ihd", weights, v), scores.to(accurate).logsumexp(-1).T


def check_block_attention(device: str, dtype: torch.dtype, group: str) -> int:
    for window, reach, offsets, lengths, rows, hq, hkv, d, sharp in BLOCK_CASES[group]:
        what = f"{dtype} {(window, reach, offsets, lengths, rows, hq, hkv, d, sharp)}"
        gen = torch.Generator().manual_seed(rows)
        offset = torch.tensor(offsets, dtype=torch.int32, device=device)
        cu = None if lengths is None else torch.stack([packed(lengths), packed(lengths) * 0], 1)[:, 0].to(device)
        leaves = [
            random((rows, heads, d), dtype, device, gen, scale).requires_grad_()
            for heads, scale in ((hq, sharp), (hkv, 1), (hkv, 1))
        ]
        out, lse = block_attention(*leaves, window, offset, cu, reach=reach, backend="triton")
        up = random(out.shape, dtype, device, gen), random(lse.shape, torch.float32, device, gen)
        grads = torch.autograd.grad((out, lse), leaves, up, retain_graph=True)
        repeated = torch.autograd.grad((out, lse), leaves, up)
        assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True)), what
        if rows == 0:
            continue
        first, end = visible_keys(rows, window, offset, cu, reach)
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
        rounding = score_rounding(*leaves[:2])
        for i, (name, got) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True)):
            pick = seen if i < 2 else slice(None)
            factor, result = 2 if i < 2 else 3, (eager[i][pick], exact[i][pick])
            close_as_eager(got[pick], *result, factor, f"{what} {name}", rounding)
    return len(BLOCK_CASES[group])


def check_partial_and_strided(device: str, dtype: torch.dtype) -> int:
    """One input requires grad, one output is used, strides are odd: the same numbers as the plain call."""
    gen, offset = torch.Generator().manual_seed(5), torch.tensor([1], dtype=torch.int32, device=device)
    q, k, v = (random((40, heads, 64), dtype, device, gen) for heads in (4, 1, 1))
    up = random(q.shape, dtype, device, gen)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(block_attention(*full, 4, offset, backend="triton")[0], full, up)
    odd = q.transpose(0, 1).contiguous().transpose(0, 1), k[:1].expand(40, 1, 64), torch.stack([v, v], -1)[..., 0]
    same = block_attention(q, k[:1].repeat(40, 1, 1), v, 4, offset, backend="triton")
    for got, expected in zip(block_attention(*odd, 4, offset, backend="triton"), same, strict=True):
        assert torch.equal(got, expected)
    for i in range(3):
        tensors = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        got = torch.autograd.grad(block_attention(*tensors, 4, offset, backend="triton")[0], tensors[i], up)[0]
        assert torch.equal(got, want[i])
    return 4


def check_what_is_out_of_reach(device: str, dtype: torch.dtype) -> int:
    """Tiles are of 128 rows and keys at most."""
    nothing_out_of_reach_is_read("triton", device, dtype, 128 if device == "cuda" else 32)
    return 1


def check_variants(device: str, dtype: torch.dtype) -> int:
    """What a configuration says beside its sizes changes no number, where the tensors let it serve."""
    from beagle_kernels.triton import configs
    from beagle_kernels.triton.tiles import readable_by_tma

    gen, arch = torch.Generator().manual_seed(8), configs.architecture(torch.device(device))
    offset, cu = torch.tensor([1, 3], dtype=torch.int32, device=device), packed([3, 67]).to(device)
    variants = [
        {name: name in taken for name in configs.Config._fields[4:]}
        for taken in ((), ("tma",), ("ahead",), ("tma", "ahead"))
    ]
    results = []
    wide = random((70, 6, 64), dtype, device, gen)
    apart = [random((70, heads, 64), dtype, device, gen) for heads in (4, 1, 1)]
    for (q, k, v), reach in ((wide.tensor_split((4, 5), 1), None), (apart, 40)):
        assert all(map(readable_by_tma, (q, k, v))) and not readable_by_tma(v[..., 1:])
        results, up = [], random(q.shape, dtype, device, gen)
        keys = [(name, arch, 64, dtype) for name in ("block_forward", "block_dq", "block_dkv")]
        shipped = [configs.choose(*key) for key in keys]
        for variant in dict.fromkeys(tuple(one.items()) for one in variants):
            tuned = {key: config._replace(**dict(variant)) for key, config in zip(keys, shipped, strict=True)}
            with mock.patch.dict(configs._tuned, tuned):
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                out, lse = block_attention(*leaves, 4, offset, cu, reach=reach, backend="triton")
                results.append((out, lse, *torch.autograd.grad(out, leaves, up)))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])
    return 2 * (len(results) - 1)
