"""tree_attention against SDPA under the same mask: given, built anew, and with query heads folded into rows; and what
models add to attention: windows, sinks, soft caps, values of another width than keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from beagle_kernels import tree_attention
from beagle_kernels.reference.tree_attention import visible_slots
from bench.peers import sdpa
from bench.registry import Case, assert_near, drive, label, parameters

SHAPES = {
    # size -> (batch, nodes, prefix, query heads, key heads, head size, dtype)
    "tiny": [(2, 6, 70, 4, 2, 16, torch.float32)],
    "small": [(b, n, prefix, 9, 3, 64, torch.float32) for b, n, prefix in ((1, 8, 300), (1, 16, 400), (4, 60, 1000))],
    "full": [(8, n, prefix, 32, 8, 128, torch.bfloat16) for prefix in (2**15, 2**13) for n in (16, 64)]
    + [(batch, 64, 2**15, 32, 8, 128, torch.bfloat16) for batch in (1, 2, 4)],
    "scaling": [(1, 16, 2**n, 9, 3, 64, torch.float32) for n in range(7, 15)]
    + [(batch, 16, 1024, 9, 3, 64, torch.float32) for batch in (2, 4, 8, 16)],
}
LONGEST = {"full": [(8, n, 2**17, 32, 8, 128, torch.bfloat16) for n in (16, 64)]}
"""Last of all: SDPA under a dense mask takes long there."""


class Layer(NamedTuple):
    """An attention layer as some model has it."""

    what: str
    heads: tuple[int, int]
    widths: tuple[int, int]
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None


WINDOW = Layer("window 1024", (9, 3), (64, 64), window=1024)
SINKS = Layer("sinks", (64, 8), (64, 64), sinks=True)
WINDOW_SINKS = Layer("window 128, sinks", (64, 8), (64, 64), window=128, sinks=True)
SOFTCAP = Layer("soft cap 50", (8, 4), (256, 256), softcap=50.0)
LATENT = Layer("keys 192 and values 128 wide", (16, 16), (192, 128))
LAYERS = {
    # size -> (layer, batch, nodes, prefix, dtype)
    "tiny": [
        (
            Layer("window 20, sinks, soft cap 5", (4, 2), (16, 24), window=20, sinks=True, softcap=5.0),
            2,
            6,
            70,
            torch.float32,
        )
    ],
    "small": [
        (WINDOW, 1, 8, 2**15, torch.float32),
        (SINKS, 1, 8, 1000, torch.float32),
        (WINDOW_SINKS, 1, 8, 1000, torch.float32),
        (SOFTCAP, 1, 8, 1000, torch.float32),
        (LATENT, 1, 8, 1000, torch.float32),
    ],
    "full": [
        (layer, 8, 64, 2**15, torch.bfloat16)
        for layer in (WINDOW._replace(heads=(32, 8), widths=(128, 128)), SINKS, WINDOW_SINKS, SOFTCAP, LATENT)
    ],
    "scaling": [],
}


def random_trees(batch: int, nodes: int) -> torch.Tensor:
    """Ancestor words of random trees [B, N, W]."""
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for n in range(nodes):
        if n:
            mask[:, n] = mask[torch.arange(batch), torch.randint(n, (batch,))]
        mask[:, n, n] = True
    padded = F.pad(mask, (0, -nodes % 64)).unflatten(-1, (-1, 64)).long()
    return (padded << torch.arange(64)).sum(-1)


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    yield from of_shapes(SHAPES[size], device)
    for layer, batch, nodes, prefix, dtype in LAYERS[size]:
        mask = random_trees(batch, nodes).to(device)
        inputs = [drawn(batch, nodes, prefix, *layer.heads, layer.widths[0], device, dtype) for _ in range(2)]
        inputs = [(q, k, torch.randn(*k.shape[:3], layer.widths[1], device=device, dtype=dtype)) for q, k, _ in inputs]
        yield of_layer(layer, inputs, mask, prefix)
        if layer.window:
            yield of_layer(layer, inputs, mask, prefix, beside_slice=True)
    yield from of_shapes(LONGEST.get(size, []), device)


def of_shapes(shapes: list[tuple], device: str) -> Iterator[Case]:
    for batch, nodes, prefix, hq, hkv, d, dtype in shapes:
        mask = random_trees(batch, nodes).to(device)
        inputs = [drawn(batch, nodes, prefix, hq, hkv, d, device, dtype) for _ in range(2)]
        yield of_inputs(inputs, mask, prefix)


def drawn(batch, nodes, prefix, hq, hkv, d, device, dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v: normal random, with a common part that gives the tree's slots, and the prefix's last 64, about half of
    the weight: a wrong bit or a dropped key there shows in any precision."""
    common = torch.randn(d, device=device)
    common *= (torch.tensor(float(prefix)).log() * d**0.5).sqrt() / common.norm()
    q, k = torch.randn(batch, nodes, hq, d, device=device), torch.randn(batch, hkv, prefix + nodes, d, device=device)
    q += common
    k[:, :, max(prefix - 64, 0) :] += common
    return q.to(dtype), k.to(dtype), torch.randn(k.shape, device=device, dtype=dtype)


def of_inputs(inputs: list[tuple], mask: torch.Tensor, prefix: int) -> Case:
    q, k, _ = inputs[0]
    (batch, nodes, hq, d), hkv, dtype = q.shape, k.shape[1], q.dtype
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=q.device)
    visible = visible_slots(prefix + nodes, lengths, mask)[:, None]
    folded_mask = visible.repeat(1, 1, hq // hkv, 1)
    attend = sdpa.attention()

    def beagle(q, k, v):
        return tree_attention(q, k, v, lengths, mask)

    def given(q, k, v, seen=visible):
        return attend(q.transpose(1, 2), k, v, seen).transpose(1, 2)

    def built(q, k, v):
        """What a caller pays each round: the mask changes with the tree and the lengths."""
        return given(q, k, v, visible_slots(prefix + nodes, lengths, mask)[:, None])

    def folded(q, k, v):
        """The query heads that share a key head as more rows of it: each key is read once, the masked kernels serve."""
        q = q.unflatten(2, (hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = attend(q, k, v, folded_mask)
        return out.unflatten(2, (hq // hkv, nodes)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    peers = {"beagle": beagle, "sdpa mask": given, "sdpa mask built": built, "sdpa folded": folded}
    most = 2e-2 if dtype != torch.float32 else 1e-4

    def check_peer(name: str) -> None:
        # row by row and head by head, so that the truth in float32 needs little memory
        for row in range(batch):
            q, k, v = (x[row : row + 1] for x in inputs[0])
            found = peers[name](*inputs[0])[row]
            for head in range(hkv):
                keys, values = (x[:, head].float() for x in (k, v))
                queries = q[0, :, head * (hq // hkv) : (head + 1) * (hq // hkv)].float()  # [N, group, D]
                scores = torch.einsum("ngd,sd->ngs", queries, keys[0]) * d**-0.5
                scores = scores.masked_fill(~visible[row, 0][:, None], float("-inf"))
                truth = torch.einsum("ngs,sd->ngd", scores.softmax(-1), values[0])
                part = found[:, head * (hq // hkv) : (head + 1) * (hq // hkv)]
                assert_near("tree_attention" if name == "beagle" else name, part, truth, most)

    cache = 2.0 * k.numel() * k.element_size()
    return Case(
        f"tree_attention {batch} x {nodes} nodes, {prefix} keys, {hq}/{hkv} x {d} {str(dtype)[6:]}",
        peers,
        lambda: check_peer("beagle"),
        inputs=inputs,
        device=q.device.type,
        check_peer=check_peer,
        rounds=30,
        data="normal random, tree slots raised",
        work={"byte": cache, "flop": 4.0 * batch * nodes * hq * d * prefix},
        series="tree_attention",
        at={"batch": batch, "nodes": nodes, "keys": prefix, "heads": f"{hq}/{hkv} x {d}"},
    )


def written_out(visible: torch.Tensor, sinks: torch.Tensor | None, softcap: float | None) -> Callable:
    """Attention step by step, as a model's own code has it."""

    def attend(q, k, v):
        group, nodes = q.shape[2] // k.shape[1], q.shape[1]
        queries = q.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, group N, D]
        scores = (queries @ k.transpose(2, 3) * q.shape[3] ** -0.5).unflatten(2, (group, nodes))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        if sinks is not None:
            column = sinks.to(scores.dtype).view(-1, group, 1, 1).expand(len(q), -1, -1, nodes, 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : k.shape[2]].flatten(2, 3)
        return (weights @ v).unflatten(2, (group, nodes)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    return attend


def of_layer(layer: Layer, inputs: list[tuple], mask: torch.Tensor, prefix: int, beside_slice: bool = False) -> Case:
    """beside_slice: a window beside nothing but its own keys. Peers that read the whole cache are in a case of their
    own, since they leave the next in turn cold caches."""
    q, k, _ = inputs[0]
    (batch, nodes, hq, _), device = q.shape, q.device
    # nodes as deep as their number of ancestors: each sees as many keys as the window has
    depth = (mask[..., None] >> torch.arange(64, device=device) & 1).sum((-2, -1)) - 1
    starts = (prefix + 1 - layer.window + depth).int() if layer.window else None
    sinks = torch.randn(hq, device=device) if layer.sinks else None
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=device)
    visible, attend = visible_slots(prefix + nodes, lengths, mask), sdpa.attention()
    if starts is not None:
        visible = visible & (torch.arange(prefix + nodes, device=device) >= starts[..., None])
    more: dict[str, Any] = {"starts": starts, "sinks": sinks, "softcap": layer.softcap}
    first = prefix + 1 - layer.window if layer.window else 0

    def whole(q, k, v):
        return attend(q.transpose(1, 2), k, v, visible[:, None]).transpose(1, 2)

    def sliced(q, k, v):
        return attend(q.transpose(1, 2), k[:, :, first:], v[:, :, first:], visible[:, None, :, first:]).transpose(1, 2)

    peers: dict[str, Callable] = {"beagle": lambda q, k, v: tree_attention(q, k, v, lengths, mask, **more)}
    if starts is not None and beside_slice:
        # in a cache of their own: what was just read for "beagle" would be at hand
        short = {id(k): (k[:, :, first:].clone(), v[:, :, first:].clone()) for _, k, v in inputs}
        fewer, alone = lengths - first, more | {"starts": starts - first}
        peers["beagle alone"] = lambda q, k, v: tree_attention(q, *short[id(k)], fewer, mask, **alone)
    else:
        peers["written out"] = written_out(visible, sinks, layer.softcap)
    if sinks is None and layer.softcap is None:
        peers |= {"sdpa slice": sliced} if beside_slice else {"sdpa mask": whole}

    def check_peer(name: str) -> None:
        # row by row, so that the truth in float32 needs little memory
        for row in range(batch):
            part = [x[row : row + 1].float() for x in inputs[0]]
            truth = written_out(visible[row : row + 1], sinks, layer.softcap)(*part)[0]
            most = 2e-2 if q.dtype != torch.float32 else 1e-4
            assert_near("tree_attention" if name == "beagle" else name, peers[name](*inputs[0])[row], truth, most)

    keys = float(batch * k.shape[1] * (min(layer.window, prefix) if layer.window else prefix))
    widths = "/".join(map(str, layer.widths))
    name = f"tree_attention with {layer.what}" + " beside its own keys" * beside_slice
    return Case(
        f"{name}, {batch} x {nodes} nodes, {prefix} keys, {hq}/{k.shape[1]} x {widths} {str(q.dtype)[6:]}",
        peers,
        lambda: check_peer("beagle"),
        inputs=inputs,
        device=device.type,
        check_peer=check_peer,
        rounds=30,
        data="normal random, tree slots raised",
        work={"byte": keys * sum(layer.widths) * k.element_size()},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_tree_attention(benchmark, case, peer):
    drive(benchmark, case, peer)
