"""tree_attention with windows, sinks, soft caps, and values of another width than keys."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from test_tree_attention import BACKENDS, case, literal, paged
from torch.library import opcheck

from beagle_kernels import tree_attention
from beagle_kernels.reference.tree_attention import visible_slots

NAMES = "starts", "sinks", "softcap"
VARIANTS = {name: (name,) for name in NAMES} | {"values": (), "all": NAMES}
"""What each is given; "values" and "all" have values of another width."""
PAGE = 16


def variant(names, width=8, value_width=None, nodes=7, hq=4, hkv=2, longest=300, dtype=torch.float64):
    """Arguments, the arguments by keyword, the bool mask. Windows: row 0's begin below 0 and among the tree's slots,
    row 1's in the tree, row 2's each at another slot of a long prefix. What nobody sees holds NaN."""
    (q, k, v, lengths, mask), bits = case(
        nodes=nodes, hq=hq, hkv=hkv, d=width, prefix=(0, 5, longest), slack=PAGE - (longest + nodes) % PAGE, dtype=dtype
    )
    gen, value_width, scale = torch.Generator().manual_seed(7), value_width or width, 3.0 if "softcap" in names else 1.0
    v = torch.randn(*k.shape[:3], value_width, generator=gen, dtype=torch.float64).to(dtype)
    starts = torch.arange(nodes, dtype=torch.int32)[None] + torch.tensor([[-3], [3], [longest - 40]], dtype=torch.int32)
    given = {"starts": starts, "sinks": torch.randn(hq, generator=gen) + 1, "softcap": 2.5}
    more = {name: given[name] for name in names}
    unseen = ~visible_slots(k.shape[2], lengths, mask, more.get("starts")).any(1)[:, None, :, None]
    k, v = (x.masked_fill(unseen, float("nan")) for x in (k, v))
    return (q * scale, k, v, lengths, mask), more, bits


def in_pages(k, v, visible):
    """The caches in shuffled pages among NaN pages, and their table; a page that nobody sees has no true id."""
    rows, count = k.shape[0], k.shape[2] // PAGE
    order = torch.randperm(rows * count + 2, generator=torch.Generator().manual_seed(1))[: rows * count]
    seen = visible.any(1).unflatten(1, (count, PAGE)).any(2)
    freed = torch.tensor([-7, 2**31 - 1, int(order[0])])[torch.arange(count) % 3]
    table = torch.where(seen, order.view(rows, count), freed).int()
    return paged(k, PAGE, 2, order), paged(v, PAGE, 2, order), table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_width", [8, 24, 5])
@pytest.mark.parametrize("hq, hkv", [(4, 4), (6, 2)])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_definition(name, hq, hkv, value_width, backend, dtype):
    """Dense and in pages, whose ids may be anything where nobody sees them."""
    (q, k, v, lengths, mask), more, bits = variant(VARIANTS[name], 8, value_width, hq=hq, hkv=hkv, dtype=dtype)
    want = literal(q.double(), k.double(), v.double(), lengths, bits, **more).to(dtype)
    torch.testing.assert_close(tree_attention(q, k, v, lengths, mask, **more, backend=backend), want)
    *pages, table = in_pages(k, v, visible_slots(k.shape[2], lengths, mask, more.get("starts")))
    got = tree_attention(q, *pages, lengths, mask, block_table=table, **more, backend=backend)
    torch.testing.assert_close(got, want)


def eager(q, k, v, lengths, mask, starts=None, sinks=None, softcap=None, scale_first=True):
    """As a model's code writes it, all in the dtype given; without `scale_first` it caps what is not yet scaled."""
    visible, group = visible_slots(k.shape[2], lengths, mask, starts), q.shape[2] // k.shape[1]
    unseen = ~visible.any(1)[:, None, :, None]
    k, v = (x.masked_fill(unseen, 0.0).repeat_interleave(group, 1) for x in (k, v))
    before, after = (q.shape[-1] ** -0.5, 1.0) if scale_first else (1.0, q.shape[-1] ** -0.5)
    scores = torch.einsum("bnhd,bhsd->bhns", q, k) * before
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores * after).masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(len(q), -1, q.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).masked_fill(~visible.any(2)[:, None, :, None], 0.0)
    return torch.einsum("bhns,bhsd->bnhd", weights[..., : k.shape[2]], v)


def relative(found, want) -> torch.Tensor:
    return (found.double() - want).norm() / want.norm()


def one_slot_more(q, k, v, lengths, mask, starts, **more):
    return eager(q, k, v, lengths, mask, starts - 1, **more)


def one_slot_less(q, k, v, lengths, mask, starts, **more):
    return eager(q, k, v, lengths, mask, starts + 1, **more)


def no_sink(*args, sinks, **more):
    return eager(*args, **more)


def capped_before_scale(*args, **more):
    return eager(*args, **more, scale_first=False)


FAULTS = {"starts": (one_slot_more, one_slot_less), "sinks": (no_sink,), "softcap": (capped_before_scale,)}
SHAPES = [(1, 3, 3, 64, 64), (5, 4, 2, 40, 72), (9, 6, 2, 64, 32), (70, 8, 1, 192, 128), (16, 16, 1, 64, 64)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("nodes, hq, hkv, width, value_width", SHAPES)
def test_cpu_error_near_eager(nodes, hq, hkv, width, value_width, name, dtype, threads):
    """Against float64 at most twice eager's error, which every planted fault is far above."""
    args, more, _ = variant(VARIANTS[name], width, value_width, nodes, hq, hkv, longest=1500, dtype=dtype)
    exact = [x.double() if x.is_floating_point() else x for x in args]
    want = eager(*exact, **more)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = tree_attention(*args, **more, backend="cpu")
    finally:
        torch.set_num_threads(before)
    allowed = 2 * max(relative(eager(*args, **more), want), torch.finfo(dtype).eps / 4)
    assert relative(got, want) <= allowed
    clean = [x.nan_to_num(0.0) if x.is_floating_point() else x for x in exact]
    for fault in (fault for part in VARIANTS[name] for fault in FAULTS[part]):
        assert relative(fault(*clean, **more), want) > 3 * allowed, fault.__name__


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinks_of_any_value(backend, dtype):
    """-inf is none, +inf and what is far above all scores take everything, NaN spoils its head alone; what a node that
    sees nothing gets is 0 whatever the sink."""
    (q, k, v, lengths, mask), _, _ = variant((), dtype=dtype)
    starts = torch.zeros(3, 7, dtype=torch.int32)
    starts[:, 3], starts[:, 4] = 2**31 - 1, -(2**31)
    run = partial(tree_attention, q, k, v, lengths, mask, starts=starts, backend=backend)
    inf, nan = float("inf"), float("nan")
    out, plain = run(sinks=torch.tensor([-inf, inf, nan, 1e38])), run()
    assert torch.equal(out[:, :, 0], plain[:, :, 0]) and not out[:, :, 1].any() and not out[:, :, 3].any()
    assert not out[:, 3].any() and not plain[:, 3].any()
    assert out[:, [0, 1, 2, 4, 5, 6], 2].isnan().all() and plain[:, [0, 1, 2, 4, 5, 6]].all()
    torch.testing.assert_close(plain[:, 4], tree_attention(q, k, v, lengths, mask, backend=backend)[:, 4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_softcaps_at_their_bounds(backend, softcap):
    """The least makes all weights alike, the largest changes nothing."""
    (q, k, v, lengths, mask), _, bits = variant((), dtype=torch.float32)
    got = tree_attention(q, k, v, lengths, mask, softcap=softcap, backend=backend)
    want = literal(q * (softcap > 1), k, v, lengths, bits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_window_costs_what_it_shows(threads):
    """A window in a cache of 64k keys takes a small part of the time of all of them."""
    q, k = torch.randn(1, 8, 4, 64), torch.randn(1, 2, 2**16 + 8, 64)
    lengths, mask = torch.tensor([2**16], dtype=torch.int32), torch.full((1, 8, 1), 255)
    starts = torch.full((1, 8), 2**16 - 1024, dtype=torch.int32)

    def least(**more) -> float:
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            tree_attention(q, k, k, lengths, mask, **more, backend="cpu")
            times.append(time.perf_counter() - begin)
        return min(times)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert least(starts=starts) < least() / 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (q, k, v, lengths, mask), more, _ = variant(NAMES, 8, 24, dtype=torch.float32)
    flat = q, k, v, lengths, mask, None, 0.3, *more.values(), backend
    opcheck(torch.ops.beagle.tree_attention.default, flat)


def test_compiles_in_one_graph():
    args, more, bits = variant(NAMES, 8, 24)
    compiled = torch.compile(lambda *x: tree_attention(*x, **more) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), literal(*args[:4], bits, **more) * 2)


def test_bad_inputs():
    args, _, _ = variant((), dtype=torch.float32)
    q, k, v, lengths, mask = args
    starts, sinks = torch.zeros(3, 7, dtype=torch.int32), torch.zeros(4)
    for more, error, message in [
        ({"starts": starts.long()}, TypeError, "starts is int64; allowed: int32"),
        ({"starts": starts[:, 0]}, ValueError, r"starts has shape \[3\]; allowed: \[3, 7\]"),
        ({"sinks": sinks.half()}, TypeError, "sinks is float16; allowed: float32"),
        ({"sinks": sinks[:2]}, ValueError, r"sinks has shape \[2\]; allowed: \[4\]"),
        *(
            ({"softcap": bad}, ValueError, f"softcap is {bad}; allowed: 1e-30 to 1e30, or None for no cap")
            for bad in (0, -1.0, float("nan"), float("inf"))
        ),
    ]:
        with pytest.raises(error, match=message):
            tree_attention(*args, **more)
    with pytest.raises(ValueError, match="v has shape"):
        tree_attention(q, k, v[:, :, :-1], lengths, mask)
    with pytest.raises(ValueError, match="the values' head size is 0; allowed: 1"):
        tree_attention(q, k, v[..., :0], lengths, mask)
