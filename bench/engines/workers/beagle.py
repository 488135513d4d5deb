"""This package's loop: its engine is kept from answer to answer, and an adaptive tree's costs are measured at the
start."""

from __future__ import annotations

import inspect
from collections.abc import Callable

PACKAGES = ("torch", "transformers")


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: weights ("float32", "bfloat16" or "int8"), adaptive (whether with the draft), capacity (the most prompt
    and new tokens), threads. ValueError where `load_bundled` does not know such weights."""
    import torch

    from beagle_sd import load_bundled
    from beagle_sd.decoding.trees.calibration import adaptive_tree
    from beagle_sd.evaluation.contenders import EngineRun

    torch.set_num_threads(options["threads"])
    plain = options["weights"] in ("float32", "bfloat16")
    asked = {"dtype": getattr(torch, options["weights"])} if plain else {"weights": options["weights"]}
    if asked.keys() - inspect.signature(load_bundled).parameters.keys():
        raise ValueError(f"load_bundled has no weights={options['weights']!r} yet")
    target, _, draft = load_bundled(device="cpu", **asked)
    tree = adaptive_tree(target, draft, calibrate=True) if options["adaptive"] else None
    run = EngineRun(target, draft if tree else None, options["capacity"], options["capacity"], 0.0, tree)

    def answer(prompt: list[int], new_tokens: int) -> tuple[list[int], float | None]:
        out = run.answer(torch.tensor([prompt]), new_tokens)
        tokens = out.sequences[0, len(prompt) : len(prompt) + out.report.new_tokens].tolist()
        return tokens, sum(took for phase, took in out.report.seconds.items() if phase != "prefill")

    return answer
