"""One compact_cache_ call against a loop of index_select over layers, keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import compact_cache_
from bench.registry import Case, drive, label, parameters

SHAPES = {
    # size -> (layers, batch, key heads, slots, head size, dtype)
    "tiny": [(2, 2, 3, 512, 16, torch.float32)],
    "small": [
        (30, 1, 3, 512, 64, torch.float32),
        (32, 1, 8, 2048, 128, torch.bfloat16),
        (32, 4, 8, 1024, 128, torch.bfloat16),
    ],
    "full": [(32, 1, 8, 8192, 128, torch.bfloat16), (32, 8, 8, 4096, 128, torch.bfloat16)],
    "scaling": [],
}
PATH = (0, 2, 7, 20, 33, 41, 50)


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for layers, batch, heads, slots, width, dtype in SHAPES[size]:
        cache = torch.randn(layers, 2, batch, heads, slots, width, device=device, dtype=dtype)
        yield of_cache(cache, f"{layers} layers, {batch} x {heads} x {slots} x {width} {str(dtype)[6:]}")


def of_cache(cache: torch.Tensor, shape: str) -> Case:
    batch, length, device = cache.shape[2], 300, cache.device.type
    path = torch.tensor([PATH], dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    accepted = torch.full((batch,), len(PATH) - 1, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    slots = torch.tensor(PATH, device=device) + length

    def loop(cache: torch.Tensor = cache) -> None:
        for layer in cache:
            for half in layer:
                half[:, :, length : length + len(PATH)] = half.index_select(2, slots)

    def check() -> None:
        have, want = cache[:2].clone(), cache[:2].clone()
        compact_cache_(have, path, accepted, lengths)
        loop(want)
        assert torch.equal(have, want), "compact_cache_ is wrong"

    peers = {"beagle": lambda: compact_cache_(cache, path, accepted, lengths), "index_select loop": loop}
    # every slot of the path but the root's is read and written
    work = {"byte": 2.0 * (len(PATH) - 1) * cache[..., 0, :].numel() * cache.element_size()}
    return Case(f"compact_cache_ {shape}", peers, check, rounds=30, device=device, work=work)


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_compact_cache(benchmark, case, peer):
    drive(benchmark, case, peer)
