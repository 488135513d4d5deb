"""The Triton ops: numbers under the interpreter and on a GPU, tuning, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton_cases

from beagle_kernels import block_attention, extend_attention, tree_attention

pytest.importorskip("triton")
HERE = Path(__file__).parent


CASES = {"tree_attention": 7, "block_attention": 26, "extend_attention": 6, "distill_loss": 5}
"""How many there are at least."""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] if op == "tree_attention" else []) for op in CASES]
)
def test_under_the_interpreter(op, dtype):
    """In a process of its own, since Triton asks for its interpreter when it is imported."""
    path = os.pathsep.join(filter(None, [str(HERE), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", f"import triton, triton_cases; triton_cases.main({op!r}, {dtype!r})"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= CASES[op]


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


IN_HALF = ("packed", "few nodes", "all")
"""Groups of cases that fp16 takes too: to a kernel it differs from bf16 by the type alone."""
ON_A_GPU = [
    pytest.param(op, group, dtype, id=f"{op}, {group}, {str(dtype).removeprefix('torch.')}")
    for op, groups in triton_cases.CHECKS.items()
    for group in groups
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if group in IN_HALF else []))
]


@pytest.fixture
def poisoned():
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*determinis")
@pytest.mark.parametrize("op, group, dtype", ON_A_GPU)
def test_on_a_gpu(gpu, poisoned, op, group, dtype):
    """Few kernels each, so that processes side by side share the compiling."""
    with triton_cases.little_memory():
        assert triton_cases.CHECKS[op][group](gpu, dtype) > 0


@pytest.mark.gpu
def test_one_graph_serves_every_length(gpu):
    """tree_attention captured once gives, after lengths and starts change in place, what a fresh call gives."""
    from test_tree_attention import case

    shape = {"nodes": 4, "hq": 4, "hkv": 1, "d": 64}
    (q, k, v, lengths, mask), _ = case(**shape, prefix=(3, 500, 900), dtype=torch.bfloat16, slack=200)
    q, k, v, lengths, mask = (x.nan_to_num(0.0).to(gpu) for x in (q, k, v, lengths, mask))
    starts = torch.zeros(3, 4, dtype=torch.int32, device=gpu)
    for more in ({}, {"starts": starts, "sinks": torch.zeros(4, device=gpu), "softcap": 9.0}):
        attend = partial(tree_attention, q, k, v, lengths, mask, **more, backend="triton")
        attend()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend()
        for length in (0, 1, 255, 256, 1000):
            lengths.fill_(length)
            starts.fill_(length - 300)
            graph.replay()
            assert torch.equal(out, attend())


@pytest.mark.gpu
@pytest.mark.slow
def test_tuning_on_a_gpu(gpu, monkeypatch):
    """Whatever it finds gives the same numbers to rounding."""
    from beagle_kernels.triton import configs
    from beagle_kernels.triton.tune_block_attention import tune_block_attention

    monkeypatch.setattr(configs, "_tuned", {})
    q, k, v = (torch.randn(1000, heads, 64, device=gpu, dtype=torch.bfloat16) for heads in (4, 2, 2))
    offset = torch.zeros(1, dtype=torch.int32, device=gpu)
    before = block_attention(q, k, v, 5, offset, backend="triton")
    assert set(tune_block_attention(q, k, v, 5, offset)) == {"block_forward", "block_dq", "block_dkv"}
    torch.testing.assert_close(block_attention(q, k, v, 5, offset, backend="triton"), before, atol=2e-2, rtol=0)


def test_cpu_tensors_are_refused():
    q = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match="it takes CUDA tensors"):
        block_attention(q, q, q, 2, torch.zeros(1, dtype=torch.int32), backend="triton")
    with pytest.raises(ValueError, match="it takes CUDA tensors"):
        extend_attention(q, q[..., 0], q, q[:, None], q[:, None], backend="triton")


def test_float64_is_refused():
    q = torch.zeros(4, 2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="no float64"):
        block_attention(q, q, q, 2, torch.zeros(1, dtype=torch.int32), backend="triton")


def test_large_heads_are_refused():
    from beagle_kernels.triton.tiles import block_d

    assert [block_d(size) for size in (1, 40, 128, 256)] == [16, 64, 128, 256]
    with pytest.raises(ValueError, match="head size is 257"):
        block_d(257)


def test_tuning_keeps_the_fastest(monkeypatch):
    """A candidate that does not run is left out; during graph capture nothing is tuned."""
    from beagle_kernels.triton import configs

    slow, fast, broken = (configs.Config(n, n, 4, 1) for n in (16, 32, 64))
    key = "tree", 90, 64, torch.bfloat16
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def bench(run, return_mode):
        if configs.choose(*key) == broken:
            raise configs.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return {slow: 2.0, fast: 1.0}[configs.choose(*key)]

    monkeypatch.setattr(configs.triton.testing, "do_bench", bench)
    table = configs.choose(*key)
    assert configs.tune(*key, lambda: None, [slow, fast, broken]) == fast == configs.choose(*key) != table
    with pytest.raises(RuntimeError, match="no candidate runs"):
        configs.tune(*key, lambda: None, [broken])
    assert configs.choose(*key) == fast
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="graph capture"):
        configs.tune(*key, lambda: None)
