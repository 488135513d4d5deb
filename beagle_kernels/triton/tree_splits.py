"""How `tree_attention` in Triton cuts its work: which keys, in how many splits, by what tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config
from .tiles import ON_HOST

FEW_ROWS = 64
"""Rows of a key head, nodes times the query heads that share it, up to which the tables' tiles are those of few."""
MIN_KEYS = tl.constexpr(256)
"""Prefix keys below which a further split is not worth its combining."""
MOST_SPLITS = 128
"""The combining step reads the results of so many at once at most."""


@triton.jit
def splits_in_use(keys, words, splits):
    """Of so many of the prefix, and of the words of the masks."""
    return tl.maximum(tl.minimum(tl.cdiv(keys + 64 * (words - 1), MIN_KEYS), splits), 1)


@triton.jit
def first_slot(p_starts, N, length, NODES: tl.constexpr):
    """The first slot of the prefix that some node of the row sees, `length` if none is. All starts at once: after a
    loop over them Triton no longer pipelines the one over the keys."""
    o_node = tl.arange(0, NODES)
    b_first = tl.load(p_starts + o_node, mask=o_node < N, other=2147483647)
    return tl.minimum(tl.maximum(tl.min(b_first, 0), 0), length)


def kind_of(rows: int) -> str:
    """Which of the tables' tiles serve so many rows of a key head. Few wait for the keys, many for products."""
    return "tree_few" if rows <= FEW_ROWS else "tree"


def tiles(config: Config, rows: int, block_d: int, paged: bool) -> Config:
    """For so many rows: no larger than they fill it, 4 warps where these hold it. Of pages as many blocks of keys are
    under way as without: the look-up goes as far ahead of them as they of their products."""
    block_m = max(16, min(config.block_m, triton.next_power_of_2(rows)))
    held_by_4 = block_m < config.block_m and block_m <= (64 if block_d <= 128 else 16)
    stages = 2 * config.stages - 1 if paged else config.stages
    return Config(block_m, config.block_n, 4 if held_by_4 else config.warps, stages)


def running_at_once(config: Config, block_d: int, block_dv: int, paged: bool, q: Tensor) -> int:
    """Blocks of these tiles that the device runs at a time, by shared memory and by registers: 128 a thread in the
    smallest tiles, up to 255 in others. WGMMA, of 64 rows on, reads a block of keys while the next ones come."""
    device = torch.cuda.get_device_properties(q.device) if q.device.type == "cuda" else ON_HOST
    row = block_d * q.element_size()
    streamed = (block_d + block_dv) * q.element_size() * config.block_n
    stages = (config.stages + 1) // 2 if paged else config.stages
    wgmma = device.major == 9 and config.block_m >= 64 and q.element_size() == 2
    needed = row * config.block_m + max(1, stages - 1 + (wgmma and stages > 1)) * streamed + 1024
    by_registers = 65536 // (32 * config.warps * (128 if row * config.block_m <= 2048 else 256))
    return device.multi_processor_count * max(1, min(by_registers, device.shared_memory_per_multiprocessor // needed))


def splits_of(blocks: int, slots: int, at_once: int) -> int:
    """Splits with which the blocks come nearest to, and not above, the `at_once` that the device runs at a time; no
    more than the cache can use. What they write is so bounded too: `at_once` tiles of rows, if not one split of all."""
    return max(1, min(at_once // blocks, triton.cdiv(slots, MIN_KEYS.value), MOST_SPLITS))
