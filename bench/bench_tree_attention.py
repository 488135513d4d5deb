"""tree_attention against SDPA under the same mask.

`pytest bench/bench_tree_attention.py --benchmark-group-by=group`
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beagle_kernels import tree_attention
from beagle_kernels.reference.tree_attention import visible_slots
from bench.timing import device_for, timed

SHAPES = {
    # size -> (batch, nodes, prefix, query heads, key heads, head size, dtype)
    "small": [(b, n, prefix, 9, 3, 64, torch.float32) for b, n, prefix in ((1, 8, 300), (1, 16, 400), (4, 60, 1000))],
    "full": [(8, n, prefix, 32, 8, 128, torch.bfloat16) for n in (16, 64) for prefix in (2**15, 2**17)],
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


@pytest.mark.parametrize("name", ["beagle", "sdpa mask", "sdpa mask built", "sdpa folded"])
@pytest.mark.parametrize("size, shape", [(size, shape) for size in SHAPES for shape in SHAPES[size]], ids=str)
def test_tree_attention(benchmark, size, shape, name):
    device, (batch, nodes, prefix, hq, hkv, d, dtype) = device_for(size), shape
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=device)
    mask = random_trees(batch, nodes).to(device)
    visible = visible_slots(prefix + nodes, lengths, mask)[:, None]

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    inputs = [
        (draw(batch, nodes, hq, d), draw(batch, hkv, prefix + nodes, d), draw(batch, hkv, prefix + nodes, d))
        for _ in range(2)
    ]

    def sdpa(q, k, v, seen=visible):
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    def built(q, k, v):
        """What a caller pays each round: the mask changes with the tree and the lengths."""
        return sdpa(q, k, v, visible_slots(prefix + nodes, lengths, mask)[:, None])

    folded_mask = visible.repeat(1, 1, hq // hkv, 1)

    def folded(q, k, v):
        """The query heads that share a key head as more rows of it: each key is read once, the masked kernels serve."""
        q = q.unflatten(2, (hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=folded_mask)
        return out.unflatten(2, (hq // hkv, nodes)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def beagle(q, k, v):
        return tree_attention(q, k, v, lengths, mask)

    atol = 2e-2 if dtype != torch.float32 else 1e-4
    peers = {"beagle": beagle, "sdpa mask": sdpa, "sdpa mask built": built, "sdpa folded": folded}
    torch.testing.assert_close(peers[name](*inputs[0]), folded(*inputs[0]), atol=atol, rtol=0)
    torch.testing.assert_close(beagle(*inputs[0]), folded(*inputs[0]), atol=atol, rtol=0)
    benchmark.group = f"tree_attention {batch} x {nodes} nodes, {prefix} keys, {hq}/{hkv} x {d} {dtype}"
    cache = sum(x.numel() * x.element_size() for x in inputs[0][1:])
    work = {"byte": float(cache), "flop": 4.0 * batch * nodes * hq * d * prefix}
    timed(benchmark, peers[name], inputs, work=work, peer=name)
