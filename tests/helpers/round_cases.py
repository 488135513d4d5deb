"""Engines on the CPU that go a GPU's way, for tests of rounds."""

from __future__ import annotations

import torch
from decoding_cases import prompts
from models import VOCAB

from beagle_kernels import Sampling
from beagle_sd import Engine
from beagle_sd.decoding.loop import Decoding, Row
from beagle_sd.decoding.prompts import Text
from beagle_sd.decoding.report import Clock
from beagle_sd.decoding.settings.rules import Rules
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


def begun(target, draft, batch=3, tokens=60, rules=None, **settings) -> Engine:
    """An engine whose rows have their first token."""
    engine = fixed_engine(target, draft, batch, tokens, **settings)
    lengths = range(11, 11 - 2 * batch, -2)
    begin(engine, texts(prompts(batch), lengths, tokens - 11, Sampling.of(batch, 3, 1.0), rules), [5, VOCAB + 1])
    return engine


def texts(ids, lengths, new: int, sampling: Sampling, rules: Rules | None = None) -> list[Text]:
    """The first lengths[b] tokens of each row of ids, to be followed by `new` tokens."""
    each = [Sampling(*(field[row : row + 1].cpu() for field in sampling)) for row in range(len(ids))]
    prompt = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return [Text(one, new, own, rules or Rules()) for one, own in zip(prompt, each, strict=True)]


def begin(engine: Engine, given: list[Text], ends: list[int]) -> None:
    engine.begin(range(len(given)), given, ends, Clock(engine.target.device))
    engine.receive()


def decoded(
    engine: Engine, given: list[Text], ends: list[int], ahead: bool | None = None
) -> tuple[Decoding, list[Row]]:
    """The texts written to their ends."""
    decoding, rows = Decoding(engine, ends, ahead=ahead), [Row(text) for text in given]
    decoding.admit(rows)
    while decoding.live:
        decoding.step()
    return decoding, rows
