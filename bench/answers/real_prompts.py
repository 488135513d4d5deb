"""The prompts of the end-to-end measurements: encoded, left-padded batches of the evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from beagle_sd.data.conversations import encode_chat
from beagle_sd.data.evaluation_sets import evaluation_prompts


def encoded_prompts(name: str, tokenizer, count: int, folder: Path | None = None) -> list[list[int]]:
    """The first turns of `count` prompts, spread over the whole set, as the chat template's ids.

    folder: where the set's file is; default the user's cache, into which it is downloaded.
    """
    prompts = evaluation_prompts(name, folder, download=folder is None)
    spread = [prompts[number * len(prompts) // count] for number in range(min(count, len(prompts)))]
    return [encode_chat(tokenizer, [{"role": "user", "content": prompt["turns"][0]}]) for prompt in spread]


def batches(prompts: list[list[int]], size: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, attention_mask) [size, T], padded on the left."""
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in part])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
        yield ids, mask
