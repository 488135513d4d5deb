"""torch.set_num_threads bounds the threads of our kernels too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from beagle_kernels.extension import missing_cpu

COUNT = '''
import os, torch
from beagle_kernels import Sampling, choose_tokens, tree_attention

def threads():
    return len(os.listdir("/proc/self/task"))

logits, positions, sampling = torch.randn(64, 50000), torch.arange(64), Sampling.of(64, 0, 1.0, 5, 0.9)
q, k, lengths = torch.randn(2, 16, 8, 64), torch.randn(2, 4, 600, 64), torch.tensor([500, 500]).int()
mask = torch.ones(2, 16, 1, dtype=torch.int64)

def started(most):
    """Threads that the kernels start when torch is set to so many."""
    torch.set_num_threads(most)
    before = threads()
    choose_tokens(logits, positions, sampling, backend="cpu")
    tree_attention(q, k, k, lengths, mask, backend="cpu")
    return threads() - before

print(started(1), started(3), started(2))
'''


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="needs the extension")
def test_the_kernels_start_no_more_threads_than_torch_is_set_to():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == [0, 2, 0], "the caller is one of them, and helpers stay"
