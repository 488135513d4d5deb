"""How much of everything, and the settings of a draft from which the search starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are for one H100 or H200 and a target of 135M parameters."""

    batch: int = 1024
    max_prompt_tokens: int = 192
    max_new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    ids_a_file: int = 12_000_000
    ids_a_save: int = 1_500_000
    tokens_per_step: int = 32768
    warmup_steps: int = 50
    eval_tokens: int = 131072
    held_out: int = 50
    search_steps: int = 200
    timed_steps: int = 20
    compared_steps: int = 400
    count: int = 80
    new_tokens: int = 128
    eval_batch: int = 80
    part_bytes: int = 15 << 20


TOY = Sizes(
    batch=8,
    max_new_tokens=16,
    ids_a_file=600,
    ids_a_save=200,
    tokens_per_step=256,
    warmup_steps=2,
    eval_tokens=256,
    held_out=4,
    search_steps=4,
    timed_steps=4,
    compared_steps=4,
    count=2,
    new_tokens=8,
    eval_batch=2,
    part_bytes=1 << 20,
)
"""To try every part on a CPU."""

BASE = {
    "lr": 2e-3,
    "regression": 1.0,
    "block_share": 0.45,
    "window": 1,
    "steps": 4,
    "noise": 0.0,
    "draft_vocab": 8192,
    "mlp": 1,
    "heads": 1,
    "all_key_heads": True,
    "passing_start": True,
    "norm_query": True,
    "norm_state": True,
    "norm_output": True,
    "append_states": True,
}
"""The bundled draft's settings. draft_vocab 0: all tokens; mlp, heads: that many times the target's; all_key_heads: a
key head for every query head; passing_start: training starts by `passing_start`; block_share: stage 1's part of the
steps. EAGLE-2's head has the target's key heads and its own start."""
