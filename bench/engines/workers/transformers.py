"""transformers' own `target.generate`, its cache in the model's dtype. PyTorch's threads spin for some milliseconds
after an answer, then sleep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = ("transformers", "torch")


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: model (a Hugging Face folder), dtype (torch's name), threads."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"])).eval()

    def answer(prompt: list[int], new_tokens: int) -> tuple[list[int], float | None]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        return out[0, len(prompt) :].tolist(), None

    return answer
