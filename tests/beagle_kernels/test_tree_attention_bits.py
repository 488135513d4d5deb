"""tree_attention on a CPU bit for bit: a node's result is that of a token decoded alone over the keys that it sees."""

from __future__ import annotations

import pytest
import torch

from beagle_kernels import tree_attention
from beagle_kernels.extension import missing_cpu

pytestmark = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tree_of(nodes: int) -> list[list[int]]:
    """Each node's ancestors and itself, of a random tree."""
    paths = [[0]]
    for node in range(1, nodes):
        paths.append([*paths[int(torch.randint(node, ()))], node])
    return paths


def words_of(paths: list[list[int]]) -> torch.Tensor:
    words = torch.zeros(1, len(paths), (len(paths) + 63) // 64, dtype=torch.int64)
    for node, path in enumerate(paths):
        for seen in path:
            words[0, node, seen // 64] |= (1 << seen % 64) - (1 << 64 if seen % 64 == 63 else 0)
    return words


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, width", [(9, 3, 64), (4, 4, 20), (8, 1, 48)])
@pytest.mark.parametrize("length", [0, 50, 62, 700])
def test_nodes_of_a_tree_are_tokens_decoded_alone(length, heads, kv_heads, width, dtype, threads):
    """Whatever other nodes stand between, whatever tile its keys fall into, and however many threads work."""
    nodes = 21
    q = torch.randn(1, nodes, heads, width).to(dtype)
    k, v = (torch.randn(1, kv_heads, length + 64, width).to(dtype) for _ in range(2))
    k[:, :, length + nodes :], v[:, :, length + nodes :] = torch.nan, torch.nan
    lengths, paths = torch.tensor([length], dtype=torch.int32), tree_of(nodes)
    more = {"softcap": 5.0, "sinks": torch.randn(heads)} if heads == 8 else {}
    threads(1)
    whole = tree_attention(q, k, v, lengths, words_of(paths), **more)
    for node, path in enumerate(paths):
        # the same keys as a cache has them after these nodes were accepted: one after the other
        slots = torch.tensor([*range(length), *(length + ancestor for ancestor in path)])
        keys, values = (torch.nn.functional.pad(x[:, :, slots], (0, 0, 0, 7), value=torch.nan) for x in (k, v))
        now = torch.tensor([len(slots) - 1], dtype=torch.int32)
        alone = tree_attention(q[:, node : node + 1], keys, values, now, torch.ones(1, 1, 1, dtype=torch.int64), **more)
        assert torch.equal(alone[0, 0], whole[0, node]), node
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(tree_attention(q, k, v, lengths, words_of(paths), **more), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_batch_is_that_row_alone(dtype, threads):
    nodes, lengths = 12, torch.tensor([5, 900, 0, 333], dtype=torch.int32)
    q = torch.randn(4, nodes, 6, 32).to(dtype)
    k, v = (torch.randn(4, 2, 970, 32).to(dtype) for _ in range(2))
    mask = words_of(tree_of(nodes)).expand(4, -1, -1)
    starts = torch.tensor([0, 640, 0, 100], dtype=torch.int32)[:, None].expand(-1, nodes).contiguous()
    for count in (1, 3):
        threads(count)
        whole = tree_attention(q, k, v, lengths, mask, starts=starts)
        for row in range(4):
            one = slice(row, row + 1)
            alone = tree_attention(q[one], k[one], v[one], lengths[one], mask[one], starts=starts[one])
            assert torch.equal(alone, whole[one])
            few = tree_attention(q[one, :1], k[one], v[one], lengths[one], mask[one, :1], starts=starts[one, :1])
            assert torch.equal(few, whole[one, :1])
