"""tree_attention: prefix and ancestors, dense and paged caches whose unused slots hold NaN."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from beagle_kernels.reference.tree_attention import visible_slots
from beagle_kernels.tree_attention import tree_attention

BACKENDS = ["reference", "cpu"]


def random_tree(batch: int, nodes: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestor masks of random trees, as bool [B, N, N] and as int64 words [B, N, W]."""
    bits = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for b in range(batch):
        for n in range(nodes):
            if n:
                bits[b, n] = bits[b, int(torch.randint(n, (), generator=gen))]
            bits[b, n, n] = True
    return bits, pack(bits)


def pack(bits: torch.Tensor) -> torch.Tensor:
    words = -(-bits.shape[-1] // 64)
    padded = torch.nn.functional.pad(bits, (0, 64 * words - bits.shape[-1])).unflatten(-1, (words, 64)).long()
    return (padded << torch.arange(64)).sum(-1)


def case(batch=3, nodes=7, hq=4, hkv=2, d=8, prefix=(0, 5, 40), slack=3, dtype=torch.float64, seed=0):
    """q, k, v, lengths, mask and the bool mask; every slot that no node sees holds NaN."""
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(prefix, dtype=torch.int32)
    slots = int(lengths.max()) + nodes + slack
    q = torch.randn(batch, nodes, hq, d, generator=gen, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(batch, hkv, slots, d, generator=gen, dtype=torch.float64).to(dtype) for _ in range(2))
    for b, length in enumerate(prefix):
        k[b, :, length + nodes :] = float("nan")
        v[b, :, length + nodes :] = float("nan")
    bits, mask = random_tree(batch, nodes, gen)
    return (q, k, v, lengths, mask), bits


def literal(q, k, v, lengths, bits, scale=None, *, starts=None, sinks=None, softcap=None):
    out, group = q.new_zeros(*q.shape[:3], v.shape[-1]), q.shape[2] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, length in enumerate(lengths.tolist()):
        for n in range(q.shape[1]):
            slots = list(range(length)) + [length + j for j in range(bits.shape[2]) if bits[b, n, j]]
            slots = [s for s in slots if s < k.shape[2] and (starts is None or s >= starts[b, n])]
            keys, values = (x[b, :, slots].repeat_interleave(group, 0) for x in (k, v))
            scores = torch.einsum("hd,hsd->hs", q[b, n], keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(scores.dtype)[:, None]], 1)
            weights = torch.softmax(scores, -1)[:, : len(slots)]
            out[b, n] = torch.einsum("hs,hsd->hd", weights, values)
    return out


def paged(x: torch.Tensor, page: int, spare: int, order: torch.Tensor) -> torch.Tensor:
    """The dense cache [B, Hkv, S, D], S a multiple of page, cut into pages laid out in `order` among NaN pages."""
    batch, heads, slots, d = x.shape
    cut = x.unflatten(2, (slots // page, page)).transpose(1, 2).reshape(-1, heads, page, d)
    pages = x.new_full((cut.shape[0] + spare, heads, page, d), float("nan"))
    pages[order] = cut
    return pages


def ring_case(nodes=7, hq=4, hkv=2, d=8, ring=263, dtype=torch.float64):
    """The same of a draft that sees a window: no prefix, but bits for most of a ring of keys, and for a tree behind."""
    (q, k, v, lengths, _), tree = case(3, nodes, hq, hkv, d, (ring,) * 3, dtype=dtype)
    seen = torch.zeros(3, 1, ring, dtype=torch.bool)
    for row, (start, count) in enumerate(((0, 5), (ring - 9, ring - 4), (70, 100))):
        seen[row, 0, (start + torch.arange(count)) % ring] = True
        for x in (k, v):
            x[row, :, :ring][:, ~seen[row, 0]] = float("nan")
    bits = torch.cat([seen.expand(-1, nodes, -1), tree], 2)
    return (q, k, v, lengths * 0, pack(bits)), bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mask_alone_of_several_words(backend, dtype):
    (q, k, v, lengths, mask), bits = ring_case(dtype=dtype)
    want = literal(q.double(), k.double(), v.double(), lengths, bits)
    torch.testing.assert_close(tree_attention(q, k, v, lengths, mask, backend=backend), want.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hq, hkv", [(4, 4), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("nodes", [1, 7, 70])
def test_equals_the_definition(backend, nodes, hq, hkv):
    args, bits = case(nodes=nodes, hq=hq, hkv=hkv)
    torch.testing.assert_close(tree_attention(*args, backend=backend), literal(*args[:4], bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_slots_past_the_cache(backend):
    """Bits may name slots past the cache: they are ignored."""
    (q, k, v, lengths, mask), bits = case(slack=0, prefix=(2, 5, 9))
    mask, bits = torch.full_like(mask, -1), torch.ones(3, 7, 64, dtype=torch.bool)
    k, v = torch.randn_like(k), torch.randn_like(v)
    got = tree_attention(q, k, v, lengths, mask, scale=0.7, backend=backend)
    torch.testing.assert_close(got, literal(q, k, v, lengths, bits, 0.7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_that_sees_nothing(backend):
    (q, k, v, lengths, mask), _ = case(prefix=(0, 0, 4))
    mask[0] = 0
    got = tree_attention(q, k, v, lengths, mask, backend=backend)
    assert not got[0].any() and got[1:].all()
    empty = tree_attention(q[:, :0], k, v, lengths, mask[:, :0], backend=backend)
    assert empty.shape == (3, 0, 4, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged(backend):
    """Shuffled pages among NaN pages give what the dense cache gives; unused table entries may be anything."""
    (q, k, v, lengths, mask), bits = case(slack=1, prefix=(0, 5, 40))
    page, slots = 16, k.shape[2]
    assert slots % page == 0
    order = torch.randperm(3 * slots // page + 2, generator=torch.Generator().manual_seed(1))[: 3 * slots // page]
    table = order.view(3, -1).int()
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-(length + 7) // page) :] = -7
    pages = paged(k, page, 2, order), paged(v, page, 2, order)
    got = tree_attention(q, *pages, lengths, mask, block_table=table, backend=backend)
    torch.testing.assert_close(got, literal(q, k, v, lengths, bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_without_columns_shows_nothing(backend):
    """It is not taken for no table, whose rows would be sought among pages."""
    (q, _, _, lengths, mask), _ = case(dtype=torch.float32)
    pages, table = torch.randn(1, 2, 16, 8), torch.zeros(3, 0, dtype=torch.int32)
    assert not tree_attention(q, pages, pages, lengths, mask, block_table=table, backend=backend).any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "nodes, hq, hkv, d", [(1, 3, 3, 64), (5, 4, 2, 40), (9, 6, 2, 64), (70, 8, 1, 128), (600, 4, 2, 16)]
)
def test_cpu_error_near_eager(nodes, hq, hkv, d, dtype, threads):
    """Few rows and many, keys split over threads, pages read in place; against float64 at most twice eager's error."""
    (q, k, v, lengths, mask), bits = case(nodes=nodes, hq=hq, hkv=hkv, d=d, prefix=(0, 300, 1500), dtype=dtype)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % 64)) for x in (k, v))
    want = tree_attention(q.double(), k.double(), v.double(), lengths, mask, backend="reference")
    visible = visible_slots(k.shape[2], lengths, mask)[:, None]
    unseen = ~visible.any(2)[..., None]
    part = q.transpose(1, 2), k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    eager = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    order = torch.randperm(3 * k.shape[2] // 64, generator=torch.Generator().manual_seed(1))
    pages, before = [paged(x, 64, 1, order) for x in (k, v)], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = tree_attention(q, k, v, lengths, mask, backend="cpu")
        again = tree_attention(q, *pages, lengths, mask, block_table=order.view(3, -1).int(), backend="cpu")
    finally:
        torch.set_num_threads(before)
    error, allowed = ((x.double() - want).norm() / want.norm() for x in (got, eager))
    assert error <= 2 * max(allowed, torch.finfo(dtype).eps / 4)
    assert torch.equal(got, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """A cache kept as [B, S, Hkv, D], queries kept as [B, Hq, N, D]."""
    (q, k, v, lengths, mask), bits = case()
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(tree_attention(q, k, v, lengths, mask, backend=backend), literal(q, k, v, lengths, bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (q, k, v, lengths, mask), _ = case(dtype=torch.float32)
    opcheck(torch.ops.beagle.tree_attention.default, (q, k, v, lengths, mask, None, 0.3, None, None, None, backend))


def test_compiles_in_one_graph():
    args, bits = case()
    compiled = torch.compile(lambda *x: tree_attention(*x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), literal(*args[:4], bits) * 2)


def test_bad_inputs():
    (q, k, v, lengths, mask), _ = case(dtype=torch.float32)
    table = torch.zeros(2, 4, dtype=torch.int32)
    for args, more, error, message in [
        ((q[0], k, v, lengths, mask), {}, ValueError, r"q has shape \[7, 4, 8\]"),
        ((q, k[:2], v, lengths, mask), {}, ValueError, r"k has shape \[2, 2, 50, 8\]"),
        ((q, k, v.half(), lengths, mask), {}, TypeError, "v is float16"),
        ((q, k, v, lengths.long(), mask), {}, TypeError, "lengths is int64"),
        ((q, k, v, lengths, mask[..., :0]), {}, ValueError, "at least one word"),
        ((q, k, v, lengths, mask), {"block_table": table}, ValueError, r"block_table has shape \[2, 4\]"),
        ((q[:, :, :3], k, v, lengths, mask), {}, ValueError, "3 query heads and 2 key heads"),
    ]:
        with pytest.raises(error, match=message):
            tree_attention(*args, **more)


@pytest.mark.parametrize(
    "processors, shared_kib, rows, head_size, wanted",
    [(132, 228, 240, 128, 8), (132, 228, 32, 128, 33), (108, 164, 240, 128, 3), (84, 100, 240, 256, 1)],
)
def test_splits_make_one_wave(processors, shared_kib, rows, head_size, wanted, monkeypatch):
    """As many blocks as such a device runs at a time, or somewhat fewer; a batch that fills it is not split."""
    pytest.importorskip("triton")
    from types import SimpleNamespace

    from beagle_kernels.triton import configs
    from beagle_kernels.triton import tree_attention as kernels

    arch = {228: 90, 164: 80, 100: 86}[shared_kib]
    device = SimpleNamespace(
        major=arch // 10, multi_processor_count=processors, shared_memory_per_multiprocessor=shared_kib << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), element_size=lambda: 2)
    config = configs.choose(kernels.kind_of(rows), arch, head_size, torch.bfloat16)
    config = kernels.tiles(config, rows, head_size, False)
    at_once = kernels.running_at_once(config, head_size, head_size, False, on_gpu)
    assert at_once % processors == 0 and at_once >= processors
    blocks = 8 * -(-rows // config.block_m)
    splits = kernels.splits_of(blocks, 1 << 20, at_once)
    assert splits == wanted and blocks * splits <= at_once < blocks * (splits + 1)
    assert kernels.splits_of(blocks, 256, at_once) == 1 and kernels.splits_of(1000 * blocks, 1 << 20, at_once) == 1
    assert kernels.splits_of(1, 1 << 20, 10**6) == 128


def test_tiles_follow_the_rows():
    """No taller than the rows; 4 warps for up to 64 of them; of pages stages for the look-up too, where there are
    stages."""
    pytest.importorskip("triton")
    from beagle_kernels.triton.configs import Config
    from beagle_kernels.triton.tree_attention import kind_of, tiles

    tall, flat = Config(128, 64, 8, 3), Config(32, 32, 8, 1)
    assert tiles(tall, 240, 128, False) == tall and tiles(tall, 240, 128, True) == Config(128, 64, 8, 5)
    assert tiles(tall, 33, 128, False) == Config(64, 64, 4, 3) and tiles(tall, 1, 64, False) == Config(16, 64, 4, 3)
    assert tiles(tall, 33, 256, False) == Config(64, 64, 8, 3) and tiles(tall, 16, 256, False) == Config(16, 64, 4, 3)
    assert tiles(flat, 240, 64, True) == flat
    assert [kind_of(rows) for rows in (1, 64, 65)] == ["tree_few", "tree_few", "tree"]
