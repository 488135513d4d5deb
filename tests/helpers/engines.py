"""Stand-ins for vLLM's engines, with a small target of the tests' own: the same two calls, other orders and sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

from beagle_sd import generate


class Answers:
    """Answers by plain decoding, two at a time, the last asked for first."""

    def __init__(self, model, ends):
        self.model, self.ends = model, list(ends)
        self.asked: list[tuple] = []
        self.most, self.seeds = 0, []

    def ask(self, name: str, ids: list[int], longest: int, temperature: float, seed: int) -> None:
        assert name not in [one[0] for one in self.asked], "two answers of a name in progress"
        self.asked.append((name, ids, longest, temperature, seed))
        self.most = max(self.most, len(self.asked))
        self.seeds.append(seed)

    def step(self) -> list[tuple[str, list[int]]]:
        taken, self.asked = self.asked[-2:], self.asked[:-2]
        return [(name, self._answer(*how)) for name, *how in taken]

    def _answer(self, ids: list[int], longest: int, temperature: float, seed: int) -> list[int]:
        out = generate(
            self.model,
            None,
            torch.tensor([ids]),
            max_new_tokens=longest,
            eos_token_id=self.ends,
            temperature=temperature,
            seed=torch.tensor([seed]),
        )
        return out.sequences[0, len(ids) :].tolist()


class States:
    """States by the target's own forward, one text at a time, the last asked for first."""

    def __init__(self, model, spoil: Callable[[torch.Tensor], torch.Tensor] = lambda states: states):
        self.model, self.spoil = model, spoil
        self.asked: list[tuple[str, list[int]]] = []
        self.most = 0

    def ask(self, name: str, ids: list[int]) -> None:
        self.asked.append((name, ids))
        self.most = max(self.most, sum(len(ids) for _, ids in self.asked))

    @torch.no_grad()
    def step(self) -> list[tuple[str, torch.Tensor]]:
        name, ids = self.asked.pop()
        return [(name, self.spoil(self.model.model(torch.tensor([ids])).last_hidden_state[0]))]


def stand_in(monkeypatch) -> list[str]:
    """Let `prepare --engine vllm` run with these engines; the list grows by each that starts, and by its end."""
    from beagle_sd.vllm import checks, engine

    log: list[str] = []

    def started(name: str, make):
        @contextmanager
        def start(settings, *more):
            log.append(name)
            assert settings.tensor_parallel == 1
            model = AutoModelForCausalLM.from_pretrained(settings.target, dtype=settings.dtype)
            try:
                yield make(model.eval(), *more)
            finally:
                log.append(f"no more {name}")

        return start

    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(engine, "answering", started("answers", lambda model, ends, batch: Answers(model, ends)))
    monkeypatch.setattr(engine, "giving_states", started("states", States))
    return log
