"""The target writes answers to prompts, in continuous batches, keeping the states it had while writing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd import shards
from beagle_sd.attention import tree_attention_of
from beagle_sd.target import Target

_PREFILL_ROWS = 16
"""Prompts run together, of about equal length, so that little is padding."""


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[tuple[int, list[dict]]],
    *,
    batch: int = 128,
    max_new_tokens: int = 192,
    max_prompt_tokens: int = 256,
    temperatures: Sequence[float] = (0.0, 0.0, 0.7, 1.0),
    seed: int = 0,
) -> Iterator[shards.Sequence]:
    """An answer to every prompt, as it is finished, with the states of prompt and answer.

    prompts: (index, messages ending with a user turn); prompt i is answered at temperatures[i % len]. Prompts
    of more than max_prompt_tokens tokens are skipped. States are in the model's dtype, bf16 at most.
    """
    encoded = ((index, encode_chat(tokenizer, messages)) for index, messages in prompts)
    fitting = ((index, ids) for index, ids in encoded if len(ids) <= max_prompt_tokens)
    with torch.inference_mode(), tree_attention_of(model):
        slots = max_prompt_tokens + max_new_tokens
        writer = _Writer(Target(model), tokenizer.eos_token_id, batch, slots, max_new_tokens, temperatures, seed)
        yield from writer.run(fitting)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The chat template's ids, ready for the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class _Work:
    """An answer in progress: states has a row for every token but the last of the answer."""

    index: int
    temperature: float
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def finished(self) -> shards.Sequence:
        tokens = torch.tensor(self.prompt + self.answer[:-1])
        mask = torch.arange(len(tokens)) >= len(self.prompt) - 1
        states = torch.cat(self.states).to(torch.bfloat16)
        return shards.Sequence(tokens, mask, states, self.answer[-1], self.index, self.temperature)


class _Writer:
    """Rows of one cache, each an answer in progress; a finished row takes the next prompt."""

    def __init__(self, target: Target, end: int, batch: int, slots: int, longest: int, temperatures, seed: int):
        self.target, self.end, self.longest, self.temperatures = target, end, longest, temperatures
        self.cache = target.new_cache(batch, slots)
        self.random = torch.Generator(target.device).manual_seed(seed)
        self.rows: list[_Work | None] = [None] * batch
        self.temperature = torch.zeros(batch, device=target.device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=target.device)

    def run(self, requests: Iterator[tuple[int, list[int]]]) -> Iterator[shards.Sequence]:
        exhausted = False
        while True:
            free = [row for row, work in enumerate(self.rows) if work is None]
            if not exhausted and len(free) >= max(1, len(self.rows) // 16):
                taken = list(islice(requests, len(free)))
                exhausted = len(taken) < len(free)
                taken.sort(key=lambda request: len(request[1]))
                for start in range(0, len(taken), _PREFILL_ROWS):
                    part = taken[start : start + _PREFILL_ROWS]
                    self._admit(free[start : start + len(part)], part)
            if all(work is None for work in self.rows):
                return
            yield from self._collect()
            self._step()

    def _admit(self, rows: list[int], requests: list[tuple[int, list[int]]]) -> None:
        device = self.target.device
        lengths = torch.tensor([len(ids) for _, ids in requests], device=device)
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64, device=device)
        for place, (_, ids) in enumerate(requests):
            tokens[place, : len(ids)] = torch.tensor(ids, device=device)
        prompt = self.target.new_cache(*tokens.shape)
        hidden = self.target.prefill(tokens, lengths, prompt)
        self.cache.states[:, :, rows, :, : tokens.shape[1]] = prompt.states
        self.cache.lengths[rows] = prompt.lengths
        for place, (row, (index, ids)) in enumerate(zip(rows, requests, strict=True)):
            temperature = self.temperatures[index % len(self.temperatures)]
            self.rows[row] = _Work(index, temperature, ids, states=[hidden[place, : len(ids)].cpu()])
            self.temperature[row] = temperature
        last = hidden[torch.arange(len(rows), device=device), lengths - 1]
        self.token[rows] = self._choose(self.target.head(last), self.temperature[rows])

    def _choose(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Gumbel-max: the argmax of logits + temperature x noise, greedy at temperature 0."""
        chosen = logits.argmax(-1)
        warm = temperature.nonzero().flatten()
        if len(warm):
            noise = torch.empty(len(warm), logits.shape[1], device=logits.device).exponential_(generator=self.random)
            chosen[warm] = (logits[warm].float() - temperature[warm, None] * noise.log_()).argmax(-1)
        return chosen

    def _collect(self) -> Iterator[shards.Sequence]:
        """Append each row's pending token; give out the answers that end with it."""
        for row, token in enumerate(self.token.tolist()):
            work = self.rows[row]
            if work is None:
                continue
            work.answer.append(token)
            if token == self.end or len(work.answer) == self.longest:
                self.rows[row] = None
                self.cache.lengths[row] = 0
                yield work.finished()

    def _step(self) -> None:
        itself = torch.ones(len(self.rows), 1, 1, dtype=torch.int64, device=self.target.device)
        depth = torch.zeros_like(self.token)[:, None]
        hidden = self.target.forward(self.token[:, None], depth, itself, self.cache)
        kept = hidden.cpu()
        for row, work in enumerate(self.rows):
            if work is not None:
                work.states.append(kept[row].clone())
        live = torch.tensor([work is not None for work in self.rows], device=self.target.device)
        self.cache.lengths += live.to(torch.int32)
        self.token = self._choose(self.target.head(hidden[:, 0]), self.temperature)
