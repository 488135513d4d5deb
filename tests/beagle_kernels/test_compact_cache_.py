"""compact_cache_: against slices moved one by one, dense and paged, every dtype, overlap."""

from __future__ import annotations

import pytest
import torch

from beagle_kernels import compact_cache_


def case(batch: int, slots: int, length: int, seed: int = 0):
    """Random paths with path[i] >= i: (path, num_accepted, lengths)."""
    pick = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randperm(3 * length, generator=pick)[: length - 1].sort().values + 1  # noqa: E731
    path = torch.stack([draw() for _ in range(batch)])
    path = torch.cat((torch.zeros(batch, 1, dtype=torch.long), path), 1)
    count = torch.randint(0, length, (batch,), generator=pick)
    path = torch.where(torch.arange(length) <= count[:, None], path, -1)
    lengths = torch.randint(0, slots - 3 * length - 1, (batch,), generator=pick)
    return path.int(), count.int(), lengths.int()


def moved(rows, path, count, lengths):
    """rows [layers, planes, B, Hkv, S, D] with the slots moved one at a time from a copy."""
    out = rows.clone()
    for b in range(len(path)):
        for i in range(int(count[b]) + 1):
            out[:, :, b, :, lengths[b] + i] = rows[:, :, b, :, lengths[b] + path[b, i]]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("batch, length, width", [(1, 1, 4), (3, 5, 7), (4, 9, 16)])
def test_dense(dtype, batch, length, width):
    path, count, lengths = case(batch, 64, length, seed=length)
    cache = (torch.randn(2, 2, batch, 3, 64, width) * 50).to(dtype)
    want = moved(cache.view(torch.uint8) if dtype.itemsize == 1 else cache, path, count, lengths)
    compact_cache_(cache, path, count, lengths)
    assert torch.equal(cache.view(torch.uint8) if dtype.itemsize == 1 else cache, want)


@pytest.mark.parametrize("page", [1, 8, 16])
def test_paged_equals_dense(page):
    batch, slots = 3, 64
    path, count, lengths = case(batch, slots, 6, seed=page)
    dense = torch.randn(2, 2, batch, 2, slots, 4)
    table = torch.randperm(batch * slots // page).view(batch, -1).int()
    pages = torch.randn(2, 2, batch * slots // page + 2, 2, page, 4)
    chunks = dense.unflatten(4, (-1, page)).permute(0, 1, 2, 4, 3, 5, 6)
    pages[:, :, table.long()] = chunks
    spare = pages[:, :, -2:].clone()
    compact_cache_(pages, path, count, lengths, block_table=table)
    want = moved(dense, path, count, lengths).unflatten(4, (-1, page)).permute(0, 1, 2, 4, 3, 5, 6)
    assert torch.equal(pages[:, :, table.long()], want) and torch.equal(pages[:, :, -2:], spare)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("planes", [1, 3])
def test_any_number_of_planes(planes, backend):
    """Keys alone, where values are of another width; three of anything."""
    path, count, lengths = case(3, 64, 9, seed=planes)
    cache = torch.randn(4, planes, 3, 2, 64, 5)
    want = moved(cache, path, count, lengths)
    pages, table = cache.flatten(2, 2).clone(), torch.arange(3, dtype=torch.int32)[:, None]
    compact_cache_(cache, path, count, lengths, backend=backend)
    compact_cache_(pages, path, count, lengths, block_table=table, backend=backend)
    assert torch.equal(cache, want) and torch.equal(pages, want)


def test_strided_cache_and_the_rest_untouched():
    path, count, lengths = case(2, 64, 6)
    whole = torch.randn(2, 2, 2, 64, 3, 10)
    cache = whole.transpose(3, 4)[..., 2:7]
    want = whole.clone()
    want.transpose(3, 4)[..., 2:7] = moved(cache, path, count, lengths)
    compact_cache_(cache, path, count, lengths)
    assert torch.equal(whole, want)


def test_moves_that_would_leave_the_cache_are_left_out():
    cache = torch.randn(1, 2, 3, 1, 8, 2)
    before = cache.clone()
    path = torch.tensor([[0, 3, 9], [0, -5, 0], [0, 1, 2]], dtype=torch.int32)
    compact_cache_(cache, path, torch.tensor([2, 1, 9]).int(), torch.tensor([4, 1, -2]).int())
    before[:, :, 0, :, 5] = before[:, :, 0, :, 7]
    assert torch.equal(cache, before)
    pages, table = cache.clone(), torch.tensor([[0, 7], [-1, 1], [2, 0]], dtype=torch.int32)
    counts, lengths = torch.tensor([1, 1, 1]).int(), torch.tensor([6, 7, 0]).int()
    compact_cache_(pages, path.clamp(min=0), counts, lengths, block_table=table)
    assert torch.equal(pages, before)


def test_a_table_without_columns_moves_nothing():
    """It is not taken for no table, whose rows would be moved beyond the pages."""
    path, few = torch.tensor([[0, 2, 3]] * 3, dtype=torch.int32), torch.full((3,), 2, dtype=torch.int32)
    for backend in ("cpu", "reference"):
        whole = torch.randn(1, 2, 3, 2, 16, 4)
        before = whole.clone()
        table = torch.zeros(3, 0, dtype=torch.int32)
        compact_cache_(whole[:, :, :1], path, few, few, block_table=table, backend=backend)
        assert torch.equal(whole, before)


def test_bad_input():
    cache, (path, count, lengths) = torch.randn(2, 2, 3, 2, 64, 4), case(3, 64, 5)
    for arguments, error in [
        ((cache[0], path, count, lengths), ValueError),
        ((cache[:, :0], path, count, lengths), ValueError),
        ((cache[:, :, :2], path, count, lengths), ValueError),
        ((cache.transpose(4, 5), path, count, lengths), ValueError),
        ((cache, path.long(), count, lengths), TypeError),
        ((cache, path, count.long(), lengths), TypeError),
        ((cache, path, count, lengths[:2]), ValueError),
        ((None, path, count, lengths), TypeError),
    ]:
        with pytest.raises(error, match="compact_cache_: .*allowed"):
            compact_cache_(*arguments)
    with pytest.raises(ValueError, match="block_table"):
        compact_cache_(cache, path, count, lengths, block_table=torch.zeros(2, 4, dtype=torch.int32))


def test_opcheck_and_compile():
    path, count, lengths = case(3, 64, 5)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    for cache, pages in ((torch.randn(2, 2, 3, 2, 64, 4), None), (torch.randn(2, 2, 12, 2, 16, 4), table)):
        args = (cache, path, count, lengths, pages, "reference")
        torch.library.opcheck(torch.ops.beagle.compact_cache_, args)
        have, want = cache.clone(), cache.clone()
        torch.compile(compact_cache_, fullgraph=True, backend="aot_eager")(
            have, path, count, lengths, block_table=pages
        )
        compact_cache_(want, path, count, lengths, block_table=pages)
        assert torch.equal(have, want) and not torch.equal(have, cache)
