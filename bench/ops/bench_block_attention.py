"""block_attention against dense attention under the same mask, and causal attention of the same size; and on long
texts with a reach, where its cost is linear. FlexAttention has a file of its own, bench/peers/bench_flex_attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from beagle_kernels import block_attention
from beagle_kernels.reference.block_attention import visible_keys
from bench.peers import sdpa
from bench.registry import Case, assert_near, drive, label, parameters

SHAPES = {
    # size -> (rows, query heads, key heads, head size, dtype)
    "tiny": [(70, 4, 2, 16, torch.float32)],
    "small": [(512, 9, 3, 64, torch.float32), (2048, 9, 3, 64, torch.float32)],
    "full": [(2**n, 32, 8, 128, torch.bfloat16) for n in (13, 14, 15, 11, 12)],
    "scaling": [(2**n, 9, 3, 64, torch.float32) for n in range(7, 13)],
}
WINDOW, OFFSET = 5, 2
LONG = {
    # size -> (rows, query heads, key heads, head size, dtype), reach
    "tiny": ((90, 4, 2, 16, torch.float32), 20),
    "small": ((16384, 9, 3, 64, torch.float32), 256),
    "full": ((16384, 32, 8, 128, torch.bfloat16), 256),
}
SAMPLE = 512
"""Rows whose gradients are compared where there are more."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    yield from of_all_keys(device, size)
    if size in LONG:
        (rows, hq, hkv, d, dtype), reach = LONG[size]
        inputs = [drawn(rows, hq, hkv, d, device, dtype) for _ in range(2)]
        for backward in (False, True):
            yield of_inputs(inputs, backward, reach=reach)


def of_all_keys(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    """Those without a reach."""
    for rows, hq, hkv, d, dtype in SHAPES[size]:
        inputs = [drawn(rows, hq, hkv, d, device, dtype) for _ in range(2)]
        for backward in (False, True):
            yield of_inputs(inputs, backward)


def drawn(rows: int, hq: int, hkv: int, d: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [T, heads, D]: normal random, with a part that turns with the position so that near keys weigh most: a
    limit that is off by one, or a key that is dropped, shows in the rows after it in any precision."""
    turns = min(8, d // 4)
    rate = 0.2 * 4.0 ** -torch.arange(turns, device=device)
    angle = torch.arange(rows, device=device)[:, None] * rate
    near = torch.cat([angle.cos(), angle.sin()], 1) * (torch.tensor(float(rows)).log() * d**0.5 / turns).sqrt()
    found = []
    for heads, turned in ((hq, True), (hkv, True), (hkv, False)):
        x = torch.randn(rows, heads, d, device=device)
        if turned:
            x[..., : 2 * turns] += near[:, None]
        found.append(x.to(dtype).requires_grad_())
    return tuple(found)


def name_of(rows: int, hq: int, hkv: int, d: int, dtype: torch.dtype, backward: bool) -> str:
    """A case's name, but for what it is beside."""
    return f"block_attention {'backward' if backward else 'forward'} {rows} x {hq}/{hkv} x {d} {str(dtype)[6:]}"


def of_inputs(
    inputs: list[tuple],
    backward: bool,
    reach: int | None = None,
    others: Callable[[tuple], dict] | None = None,
    beside: str = "",
) -> Case:
    """`backward` times the gradients alone, of outputs computed before. `others` makes the peers from the limits, SDPA
    without it; `beside` says which, in the case's name."""
    q = inputs[0][0]
    (rows, hq, d), hkv, dtype, device = q.shape, inputs[0][1].shape[1], q.dtype, q.device.type
    offset = torch.tensor([OFFSET], dtype=torch.int32, device=device)
    limits = visible_keys(rows, WINDOW, offset, None, reach)
    if others is not None:
        peers = others(limits)
    else:
        peers = sdpa_peers(rows, limits, hq // hkv, device)
        if reach is not None:
            peers = {"sdpa mask": peers["sdpa mask"]}
    forward = {"beagle": lambda q, k, v: block_attention(q, k, v, WINDOW, offset, reach=reach)[0], **peers}
    run = {name: peer if isinstance(peer, str) else without_grad(peer) for name, peer in forward.items()}
    up = torch.randn(rows, hq, d, device=device, dtype=dtype)
    bounds = tuple(name for name in forward if "causal" in name or "mask made" in name)
    if backward:

        @functools.cache
        def out_of(name: str, number: int) -> torch.Tensor:
            return forward[name](*inputs[number])

        def gradients(name: str) -> Callable:
            return lambda number: torch.autograd.grad(out_of(name, number), inputs[number], up, retain_graph=True)

        run = {name: peer if isinstance(peer, str) else gradients(name) for name, peer in forward.items()}
        run = {name: peer for name, peer in run.items() if "mask made" not in name}

    def check_peer(name: str) -> None:
        if name in bounds:
            return
        check = check_gradients if backward else check_forward
        check("block_attention" if name == "beagle" else name, forward[name], inputs[0], limits)

    pairs = (limits[1] - limits[0]).sum().item()
    direction = "backward" if backward else "forward"
    name = name_of(rows, hq, hkv, d, dtype, backward) + (f", reach {reach}" if reach is not None else "")
    return Case(
        name + (f", beside {beside}" if beside else ""),
        run,
        lambda: check_peer("beagle"),
        bounds=bounds,
        device=device,
        check_peer=check_peer,
        rounds=15 if rows <= 2048 else 5 if reach is None or device == "cuda" else 2,
        inputs=[(0,), (1,)] if backward else inputs,
        work={"flop": 4.0 * d * hq * pairs * (2.5 if backward else 1)},
        data="normal random, near keys raised",
        series="" if beside else f"block_attention {direction}",
        at={"rows": rows, "heads": f"{hq}/{hkv} x {d}"} | ({} if reach is None else {"reach": reach}),
    )


def without_grad(peer: Callable) -> Callable:
    def run(*args):
        with torch.no_grad():
            return peer(*(x.detach() for x in args))

    return run


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]


def sdpa_peers(rows: int, limits: tuple[torch.Tensor, torch.Tensor], group: int, device: str) -> dict:
    """Each takes q, k, v [T, heads, D] and gives [T, Hq, D]; masks are made here, outside the time."""
    first, end = limits
    key = torch.arange(rows, device=device)
    mask = (key < end[:, None]).logical_and_(key >= first[:, None])

    def dense(q, k, v):
        q, k, v = heads_first(q, k, v)
        if device == "cuda":
            k, v = sdpa.expanded(k, v, group=group)
        return sdpa.attention()(q, k, v, mask)[0].transpose(0, 1)

    def causal(backend: str | None):
        attend = sdpa.attention(backend)
        return lambda q, k, v: attend(*heads_first(q, k, v), causal=True)[0].transpose(0, 1)

    backends = {f"sdpa causal {backend}": causal(backend) for backend in ("flash", "cudnn")} if device == "cuda" else {}
    return {"sdpa causal": causal(None), **backends, "sdpa mask": dense}


def dense_rows(q, k, v, limits, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) by the definition, in float32; a row without a key gives 0. limits: the first key of each row
    and the end of its keys."""
    queries = q[first:last].float().unflatten(1, (k.shape[1], -1))  # [R, Hkv, group, D]
    low, high = (x[first:last, None] for x in limits)
    near = slice(int(low.min()), max(int(high.max()), int(low.min()) + 1))
    key, k, v = torch.arange(len(k), device=k.device)[near], k[near], v[near]
    seen = (key >= low) & (key < high)
    scores = torch.einsum("rhgd,thd->rhgt", queries, k.float()) * q.shape[-1] ** -0.5
    weight = scores.masked_fill(~seen[:, None, None], -1e30).softmax(-1) * seen.any(1)[:, None, None, None]
    return torch.einsum("rhgt,thd->rhgd", weight, v.float()).flatten(1, 2)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 2e-2


def check_forward(name: str, attend: Callable, inputs: tuple, limits: tuple) -> None:
    """All rows that see a key; of ours the others too, which are 0."""
    with torch.no_grad():
        q, k, v = (x.detach() for x in inputs)
        found = attend(q, k, v)
        for first in range(0 if name == "block_attention" else OFFSET + WINDOW, len(found), 128):
            last = min(first + 128, len(found))
            truth = dense_rows(q, k, v, limits, first, last)
            assert_near(name, found[first:last], truth, tolerance(found.dtype))


def check_gradients(name: str, attend: Callable, inputs: tuple, limits: tuple) -> None:
    """The gradients of the last rows' outputs, all rows where there are few: without a reach those see every key."""
    rows, dtype = len(inputs[0]), inputs[0].dtype
    first = max(OFFSET + WINDOW, rows - SAMPLE)
    up = torch.randn(inputs[0].shape, device=limits[0].device, dtype=dtype)
    up[:first] = 0
    found = torch.autograd.grad(attend(*inputs), inputs, up)
    leaves = q, k, v = tuple(x.detach().float().requires_grad_() for x in inputs)
    truth = [torch.zeros_like(x) for x in leaves]
    for start in range(first, rows, 128):
        stop = min(start + 128, rows)
        part = torch.autograd.grad(dense_rows(q, k, v, limits, start, stop), leaves, up[start:stop].float())
        for total, more in zip(truth, part):
            total += more
    for letter, have, want in zip("qkv", found, truth):
        most = tolerance(dtype) * max(1.0, want.abs().max().item())
        assert_near(f"{name}'s gradient to {letter}", have, want, most)


@pytest.mark.parametrize("case, peer", parameters(list(of_all_keys())), ids=label)
def test_block_attention(benchmark, case, peer):
    drive(benchmark, case, peer)
