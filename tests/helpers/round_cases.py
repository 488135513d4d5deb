"""Engines on the CPU that go a GPU's way, for tests of rounds."""

from __future__ import annotations

import torch
from decoding_cases import prompts
from models import VOCAB

from beagle_kernels import Sampling
from beagle_sd import Engine
from beagle_sd.decoding.report import Clock
from beagle_sd.decoding.trees.tree import TreeShape

PATHS = {"dense": {}, "pages": {"page_size": 7}}
TREE = TreeShape(4, 4, 16)


def rows(batch: int, longest: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 1 to `longest` tokens, padded on the left, and their mask."""
    lengths = torch.arange(batch) * 7 % longest + 1
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return prompts(batch, longest) * mask, mask


def fixed_engine(target, draft, batch, tokens, **settings) -> Engine:
    """An engine on the CPU that goes the GPU's way."""
    return Engine(target, draft, batch=batch, capacity=tokens, fixed=True, **settings)


def begun(target, draft, batch=3, tokens=60, bias=None, **settings) -> Engine:
    """An engine whose rows have their first token."""
    engine = fixed_engine(target, draft, batch, tokens, **settings)
    ids = prompts(batch)
    lengths = torch.arange(11, 11 - 2 * batch, -2, dtype=torch.int32)
    sampling, clock = Sampling.of(batch, 3, 1.0), Clock(engine.target.device)
    engine.begin(ids, lengths, sampling, tokens - 11, [5, VOCAB + 1], clock, bias)
    return engine
