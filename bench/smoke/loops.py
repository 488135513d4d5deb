"""What bench.smoke checks of rounds, answers and training, on a small random target: a function takes the device,
raises where something is wrong, and returns what is to be printed, if anything.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_sd.data.answers import Request, seed_of, write_answers
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.trainer import Trainer
from bench.answers.lossless import Agreement

VOCAB, NEW = 2000, 20
APART = 2.0**-8
"""Of a loss, with autocast against fp32: what bf16 rounds off one number."""


def models(device: str, layers: int = 2) -> tuple[LlamaForCausalLM, LlamaForCausalLM, BeagleDraft]:
    """A random target on the host and on the device, and a draft for the latter that often agrees with it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=384,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    host = LlamaForCausalLM(config).eval()
    host.get_input_embeddings().weight.data.mul_(32)
    target = copy.deepcopy(host).to(device)
    return host, target, BeagleDraft.from_target(target, torch.arange(0, VOCAB, 2, device=device)).eval()


def same_text(host, prompt: list[int], found: list[int], truth: list[int], temperature: float, seed: int) -> None:
    """Equal up to where two tokens tie."""
    compared = Agreement()
    compared.add(host, prompt, found, truth, temperature, seed)
    assert not compared.faults, f"the text parts from plain decoding's on the host: {found} for {truth}"


def rounds(device: str, page_size: int | None) -> str:
    """Captured and eager rounds give one text, drafted or not: the host's plain one."""
    host, target, draft = models(device)
    ids, counts = torch.randint(VOCAB, (3, 40)), []
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": []}
    for shape, temperature in (
        (TreeShape(6, 10, 60), 0.0),
        (TreeShape(6, 10, 60), 1.0),
        (TreeShape(4, 1, 5), 0.7),
        (None, 0.0),
    ):
        want = generate(host, None, ids, temperature=temperature, **options).sequences[:, 40:].tolist()
        more = options | {"tree": shape, "temperature": temperature}
        made = [
            generate(target, draft if shape else None, ids.to(device), graph=graph, page_size=page_size, **more)
            for graph in ((None, False) if device == "cuda" else (False,))
        ]
        assert all(torch.equal(one.sequences, made[0].sequences) for one in made), f"captured is not eager: {shape}"
        assert ("capture" in made[0].report.seconds) == (device == "cuda")
        for row, found in enumerate(made[0].sequences[:, 40:].tolist()):
            same_text(host, ids[row].tolist(), found, want[row], temperature, row)
        counts.append(made[0].report.tokens_per_round)
    assert counts[0] > 1.2, f"{counts[0]} tokens a round: acceptance was not tested"
    return "tokens a round " + ", ".join(f"{count:.2f}" for count in counts)


def answers(device: str) -> None:
    """Written in continuous batches, captured and eager, they are generate's, and nothing warns."""
    warnings.simplefilter("error")
    host, target, _ = models(device)
    model: Any = target  # transformers' wrapper hides the signature of `to`
    # two full batches: a batch of fewer rows may round otherwise, and eager rounds leave out those that ended
    requests = [Request(n, torch.randint(VOCAB, (5 + n,)).tolist(), (0.0, 0.7, 1.0)[n % 3]) for n in range(16)]
    for dtype in (torch.float32, torch.bfloat16):
        captured, eager = (
            sorted(
                write_answers(model.to(dtype), requests, ends=(), batch=8, max_new_tokens=NEW, graph=graph),
                key=lambda one: one.index,
            )
            for graph in (True, False)
        )
        for request, one, other in zip(requests, captured, eager, strict=True):
            found, again = ([*each.tokens.tolist(), each.final_token] for each in (one, other))
            assert found == again and one.states.equal(other.states), f"captured is not eager in {dtype}"
            assert len(found) == len(request.ids) + NEW and one.states.isfinite().all()
            if dtype == torch.float32:
                seed, heat = seed_of(0, request), request.temperature
                want = (
                    generate(
                        host,
                        None,
                        torch.tensor([request.ids]),
                        max_new_tokens=NEW,
                        eos_token_id=[],
                        temperature=heat,
                        seed=torch.tensor([seed]),
                    )
                    .sequences[0]
                    .tolist()
                )
                same_text(host, request.ids, found, want, heat, seed)


def training(device: str) -> str:
    """A step of either stage and an evaluation by the trainer: with autocast, beside fp32 on the host."""
    host, target, draft = models(device, layers=1)
    ours = BeagleDraft.from_target(host, torch.arange(0, VOCAB, 2))
    ours.load_state_dict(draft.state_dict())
    ids, lengths = torch.randint(VOCAB, (750,)).int(), torch.tensor([350, 250, 90, 60])
    corpus = Corpus(ids, torch.ones(750).bool(), lengths, torch.arange(4), -torch.ones(4))
    config = TrainingConfig(tokens_per_step=1000, block_epochs=1, simulation_epochs=1, lr=1e-4, warmup_steps=0)
    measured: list[list[float]] = []
    # a gradient is what is left of two distributions whose logits are rounded to bf16, so its norm is less exact
    apart = (APART, 4 * APART) * 2
    for one, model, autocast in ((draft, target, True), (ours, host, False)):
        found: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(one, LiveDataset(model, corpus, held_out=4), folder, replace(config, autocast=autocast))
            trainer.run(lambda step, row: found.extend((row["loss"], row["gradient_norm"])))  # noqa: B023
            assert trainer.step == 2
        measured.append(found)
    what = f"loss and gradient norm of either stage {measured[0]}, on the host {measured[1]}"
    assert all(abs(have - want) <= most * want for have, want, most in zip(*measured, apart, strict=True)), what
    return what
