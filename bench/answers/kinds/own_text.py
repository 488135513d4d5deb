"""What a model writes and would choose by its own code alone, none of beagle_sd: the truth of one_kind.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel

from beagle_kernels import Sampling, choose_tokens

TIE = 1e-4
"""Perturbed logits closer than this, as near a filter's edge, are a tie that rounding decides."""


def own_text(model: PreTrainedModel, prompts: Mapping[str, Tensor], count: int) -> Tensor:
    """The `count` new tokens [B, count] int64 of greedy `model.generate`; prompts are its keyword arguments."""
    made: Any = model.generate(**prompts, max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    return made[:, prompts["input_ids"].shape[1] :]


class Said(LogitsProcessor):
    """Lets `generate` say a given text [B, count] and no other."""

    def __init__(self, text: Tensor, prompt: int) -> None:
        self.text, self.prompt = text, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.text[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def stepped_logits(model: PreTrainedModel, prompts: Mapping[str, Tensor], text: Tensor) -> Tensor:
    """The logits [B, count, V] f32 by which `model.generate` would choose each token of the text [B, count]: step by
    step, with the model's own cache. RuntimeError where it cannot be made to say the text."""
    options: dict[str, Any] = {"max_new_tokens": text.shape[1], "do_sample": False, "output_logits": True}
    prompt = prompts["input_ids"].shape[1]
    kind: Any = type(model)
    for generate in (kind.generate, GenerationMixin.generate):  # Janus's own drops the processor
        said = [Said(text, prompt)]
        made: Any = generate(model, **prompts, **options, logits_processor=said, return_dict_in_generate=True)
        if made.sequences[:, prompt:].equal(text):
            return torch.stack(made.logits, 1).float()
    raise RuntimeError(f"{type(model).__name__}.generate says another text than it is made to say")


@torch.inference_mode()
def whole_logits(model: PreTrainedModel, prompts: Mapping[str, Tensor], text: Tensor) -> Tensor:
    """The same [1, count, V] f32 for one row without padding or images by one forward of prompt and text, no cache."""
    ids = torch.cat([prompts["input_ids"], text], 1)
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, prompts["input_ids"].shape[1] - 1 : -1].float()


def whole_is_stepped(model: PreTrainedModel, prompts: Mapping[str, Tensor], text: Tensor) -> bool:
    """Whether one forward of prompt and text says what the steps say; not where either fails or images are given."""
    if set(prompts) - {"input_ids", "attention_mask"}:
        return False
    try:
        whole, stepped = whole_logits(model, prompts, text), stepped_logits(model, prompts, text)
    except Exception:
        return False
    return whole.shape == stepped.shape and bool(((whole - stepped).abs() < TIE / 2).all())


def first_wrong(logits: Tensor, text: Tensor, begin: int, seed: int, settings: Mapping[str, Any]) -> int | None:
    """The first token of a text [count] that `choose_tokens` would not choose by the model's logits [count, V].

    begin is the position of text[0], settings and seed are Sampling.of's. Not wrong is a token that TIE may decide:
    chosen with its own logit so much higher and the rightful one's lower, or with top_p so much higher or lower.
    """
    positions = begin + torch.arange(len(text))
    top_p = settings.get("top_p", 1.0)
    wrong = torch.ones(len(text), dtype=torch.bool)
    rightful = None
    for moved in (top_p, top_p - TIE, top_p + TIE):
        seeds = torch.full((len(text),), seed)
        sampling = Sampling.of(len(text), seeds, **{**settings, "top_p": min(moved, 1.0)})
        chosen = choose_tokens(logits, positions, sampling)[0]
        rightful = chosen if rightful is None else rightful
        near = logits.scatter_add(1, text[:, None], torch.full_like(logits[:, :1], TIE))
        near = near.scatter_add(1, rightful[:, None], torch.full_like(logits[:, :1], -TIE))
        wrong &= (chosen != text) & (choose_tokens(near, positions, sampling)[0] != text)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
