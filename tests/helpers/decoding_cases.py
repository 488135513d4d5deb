"""Prompts, and when two texts count as the same, for tests of decoding."""

from __future__ import annotations

import torch
from models import VOCAB
from transformers.generation.streamers import BaseStreamer

from beagle_kernels import Sampling
from beagle_kernels.reference.sampling import perturb

NEW = 32


def prompts(batch: int, length: int = 11, seed: int = 5) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts of 1 to 11 tokens, padded at one side."""
    ids = prompts(4)
    mask = torch.ones_like(ids)
    for row, gap in enumerate((3, 0, 10, 6)):
        where = slice(0, gap) if side == "left" else slice(11 - gap, 11)
        mask[row, where], ids[row, where] = 0, 0
    return ids, mask


@torch.no_grad()
def greedy(target, ids, **settings) -> torch.Tensor:
    """What transformers itself writes."""
    return target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)


@torch.no_grad()
def assert_same_text(target, got, want, width, sampling=None, mask=None) -> None:
    """Equal, but for rows that part where the target's best two perturbed logits lie within 1e-3.

    mask: of prompts padded on the left.
    """
    assert got.shape == want.shape
    sampling = sampling or Sampling.of(len(got))
    starts = [0] * len(got) if mask is None else (mask == 0).sum(1).tolist()
    apart = (got != want).any(1).nonzero().flatten().tolist()
    for row in apart:
        place = int((got[row] != want[row]).nonzero()[0])
        assert place >= width, "the prompt itself changed"
        logits = target(got[row : row + 1, starts[row] : place]).logits[:, -1].float()
        own = [setting[row : row + 1] for setting in sampling]
        scores = perturb(logits, torch.tensor([place - starts[row]]), *own, penalty=torch.inf)[0]
        pair = scores[torch.stack((got[row, place], want[row, place]))]
        assert (scores.max() - pair).max() < 1e-3, f"row {row} parts at {place}: {scores.topk(3)}, {pair}"
    assert len(apart) * 2000 <= 2 * max(got.numel(), 1000), f"{len(apart)} near ties in {got.numel()} tokens"


class Recorder(BaseStreamer):
    def __init__(self):
        self.runs, self.ended = [], 0

    def put(self, value):
        self.runs.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def odd_one(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of the whole text: after an odd sum of it, tokens with odd numbers are less likely."""
    odd = (input_ids.sum(1) % 2 == 1)[:, None] & (torch.arange(scores.shape[1], device=scores.device) % 2 == 1)
    return torch.where(odd, scores - 40.0, scores)
