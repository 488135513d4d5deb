"""A training step of stage 2 beside one of stage 1 and beside a literal stage 2 of `k` passes: time and peak memory.

`python -m bench training_step`. "beagle" is the one-pass simulation, and its ratio to stage 1 is what simulation costs:
first as the trainer computes a step on a GPU, in bf16 autocast over a full step's tokens. Then, in fp32 on fewer rows,
for the whole step (forward, loss, backward) and for the block alone, without the loss that dilutes the difference; the
step by simulated steps, whose memory the paper says is constant; and Beagle's step without simulation beside EAGLE-2's.
Before any time of fp32 is taken, loss and gradients of the literal passes must equal those of the one pass; in bf16
loss and gradients must be near those of fp32 on the first sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from beagle_kernels import distill_loss
from beagle_sd.data.batch import Batch
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.objective import block_states, draft_states, row_weights, simulated_states
from bench.ops.bench_distill_loss import peak_memory
from bench.peers.eagle2 import EagleDraft, eagle_states
from bench.registry import Case

WINDOW, OFFSET = 5, 2
SHAPES = {
    # size -> (rows of one sequence, width, MLP, query heads, key heads, target's vocabulary, draft's vocabulary)
    "tiny": (60, 64, 96, 4, 2, 300, 100),
    "small": (2048, 576, 1536, 9, 3, 49152, 8192),
    "full": (2048, 4096, 14336, 32, 8, 128256, 32768),
}
"""Small and full are SmolLM2-135M's and Llama 3 8B's."""
AUTOCAST = {"tiny": 3, "full": 16}
"""Sequences of so many rows that a step in bf16 has: 16 of 2048 are the trainer's default step of 32768 tokens."""


class Setting:
    """Random weights and states of a shape, and what each peer computes on them."""

    def __init__(self, shape: tuple[int, ...], device: str, window: int = WINDOW, sequences: int = 1):
        length, width, inner, heads, key_heads, vocab, reduced = shape
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            vocab_size=vocab,
            num_key_value_heads=key_heads,
            num_hidden_layers=1,
            max_position_embeddings=length,
        )
        with torch.device(device):  # random weights of this size take a host long
            target = AutoModelForCausalLM.from_config(config)
        self.draft = BeagleDraft.from_target(target, torch.arange(reduced))
        self.eagle = EagleDraft.from_target(target, torch.arange(reduced))
        rows = sequences * length
        bounds = torch.arange(sequences + 1, dtype=torch.int32) * length
        positions = torch.arange(length).repeat(sequences)
        parts = torch.randint(vocab, (rows,)), torch.randn(rows, width), torch.ones(rows, dtype=torch.bool)
        self.batch = Batch(*(part.to(device) for part in (*parts, bounds, positions)))
        self.window = window
        self.offset = torch.full((sequences,), OFFSET % window, dtype=torch.int32, device=device)
        self.head = self.draft.head.float()

    @cached_property
    def visible(self) -> Tensor:
        """[T, 2T] bool: the true keys before a row's window, then the draft keys of its window before it. Rows without
        a key are given the first one and counted nowhere. Of one sequence."""
        index, offset = self.batch.positions, int(self.offset)
        start = index - (index - offset) % self.window
        true = (index < start[:, None]) & (index >= 0) & (index[:, None] >= offset)
        true[:, 0] |= ~true.any(1)
        inside = (index >= start[:, None]) & (index < index[:, None]) & (index >= offset) & (start[:, None] >= offset)
        return torch.cat((true, inside), 1)

    def weights(self, simulated: bool, window: int | None = None) -> Tensor:
        window = window or self.window
        return row_weights(self.batch, window, self.offset % window, simulated=simulated)

    def one_pass(self, window: int | None = None) -> list[Tensor]:
        window = window or self.window
        return [simulated_states(self.draft, self.batch, self.batch.states, window, self.offset % window)]

    def stage_one(self) -> list[Tensor]:
        return [block_states(self.draft, self.batch, self.batch.states, self.window, self.offset)]

    def eagle_step(self) -> list[Tensor]:
        return [eagle_states(self.eagle, self.batch, self.batch.states, 1, self.offset * 0, simulated=False)]

    def literal(self) -> list[Tensor]:
        """The paper's figure 2 as it stands: every pass does all rows, over [true | draft] keys under a dense mask."""
        draft, batch = self.draft, self.batch
        embedded = draft.embed(batch.tokens)
        queries = draft.queries(embedded, batch.positions)
        keys, values = draft.keys_values(batch.states, batch.positions)
        rows = len(batch.tokens)
        passes: list[Tensor] = []
        for number in range(self.window):
            seen, all_keys, all_values = self.visible[:, :rows], keys, values
            if number:
                more = draft.keys_values(passes[-1], batch.positions)
                seen, all_keys, all_values = self.visible, torch.cat((keys, more[0])), torch.cat((values, more[1]))
            q, k, v = (x.transpose(0, 1)[None] for x in (queries, all_keys, all_values))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
            passes.append(draft.block(embedded, attended))
        return passes

    def passes_weights(self) -> list[Tensor]:
        """Pass r counts rows 0 .. r of every window, once each."""
        step = (self.batch.positions - self.offset.long()) % self.window
        counted = self.weights(simulated=False)
        return [counted * (step <= number) for number in range(self.window)]

    def step(self, states: Callable[[], list[Tensor]], weights: list[Tensor], loss: bool) -> Callable[[], tuple]:
        """Forward and backward: (loss, gradients in all weights of the head). Without `loss` the weighted products
        with the true states stand for it (squares would not do: their sum is what the last norm fixes)."""
        parameters = list((self.eagle if states == self.eagle_step else self.draft).parameters())

        def run():
            total = torch.zeros((), device=self.head.device)
            for state, weight in zip(states(), weights, strict=True):
                if loss:
                    total = total + distill_loss(state.float(), self.batch.states, self.head, weight)
                else:
                    total = total + (weight[:, None] * state * self.batch.states).sum()
            return total, *torch.autograd.grad(total, parameters)

        return run


class Autocast(Setting):
    """As the trainer computes with `autocast`: products in bf16, head and stored states in bf16, weights in fp32."""

    def __init__(self, shape: tuple[int, ...], device: str, sequences: int):
        super().__init__(shape, device, sequences=sequences)
        self.head, self.dtype = self.head.bfloat16(), torch.bfloat16
        self.batch = self.batch._replace(states=self.batch.states.bfloat16())

    def first(self) -> Autocast:
        """The first sequence alone, computed in fp32 from the same weights and states."""
        one = copy(self)
        length = int(self.batch.cu_seqlens[1])
        rows = {name: getattr(self.batch, name)[:length] for name in ("tokens", "states", "loss_mask", "positions")}
        one.batch = Batch(cu_seqlens=self.batch.cu_seqlens[:2], **rows)
        one.offset = self.offset[:1]
        return one

    def in_fp32(self) -> Autocast:
        one = copy(self)
        one.head, one.dtype = self.head.float(), torch.float32
        return one

    def step_of(self, simulated: bool) -> Callable[[], tuple]:
        """Forward and backward of stage 2 or 1, as Trainer._backward has them: (loss, gradients)."""
        weights = self.weights(simulated=simulated)
        parameters = list(self.draft.parameters())

        def run():
            keys_of, device = self.batch.states.float(), self.head.device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                states = draft_states(
                    self.draft, self.batch, keys_of, self.window, self.offset, simulated=simulated
                ).to(self.dtype)
            loss = distill_loss(states, self.batch.states.to(self.dtype), self.head, weights, tf32=True)
            return loss, *torch.autograd.grad(loss, parameters)

        return run


def cases(device: str = "cpu", size: str | None = None) -> Iterator[Case]:
    size = size or ("full" if device == "cuda" else "small")
    if size not in SHAPES:
        return
    if size in AUTOCAST:
        yield in_bf16(Autocast(SHAPES[size], device, AUTOCAST[size]))
    setting = Setting(SHAPES[size], device)
    for loss in (True, False):
        yield stages(setting, loss)
    yield by_steps(setting)
    yield one_step(setting)


def in_bf16(setting: Autocast) -> Case:
    """Stage 2 beside stage 1 as they are trained."""
    peers = {"beagle": setting.step_of(simulated=True), "stage 1": setting.step_of(simulated=False)}

    def check() -> None:
        few = setting.first()
        for simulated in (True, False):
            loss, *gradients = few.step_of(simulated)()
            want, *truth = few.in_fp32().step_of(simulated)()
            assert abs(loss / want - 1) < 0.01, f"the loss is {loss:.5g} in bf16, {want:.5g} in fp32"
            off = sum((a - b).norm() ** 2 for a, b in zip(gradients, truth)) ** 0.5
            size = sum(b.norm() ** 2 for b in truth) ** 0.5
            assert off < 0.05 * size, f"gradients are off by {off / size:.3f} in bf16"

    name = f"training step, k = {setting.window}, bf16 autocast"
    return _case(setting, name, peers, check, bounds=("stage 1",))


def stages(setting: Setting, loss: bool) -> Case:
    simulated, counted = [setting.weights(simulated=True)], [setting.weights(simulated=False)]
    peers = {
        "beagle": setting.step(setting.one_pass, simulated, loss),
        "stage 1": setting.step(setting.stage_one, counted, loss),
        "literal passes": setting.step(setting.literal, setting.passes_weights(), loss),
    }

    def check() -> None:
        for have, want in zip(peers["beagle"](), peers["literal passes"](), strict=True):
            assert (have - want).norm() <= 1e-3 * want.norm(), "one pass differs from the literal passes"

    what = "step" if loss else "step, block alone"
    return _case(setting, f"training {what}, k = {setting.window}", peers, check, bounds=("stage 1",))


def by_steps(setting: Setting) -> Case:
    """Stage 2 by the number of simulated steps, which is to cost time and memory of about one pass whatever it is."""
    peers = {
        name: setting.step(partial(setting.one_pass, steps), [setting.weights(simulated=True, window=steps)], True)
        for name, steps in (("beagle", setting.window), ("1 step", 1), ("3 steps", 3), ("10 steps", 10))
    }
    return _case(
        setting,
        f"training step, {setting.window} simulated steps",
        peers,
        lambda: _finite(peers),
        bounds=tuple(peers)[1:],
    )


def one_step(setting: Setting) -> Case:
    """Beagle's stage 1 beside EAGLE-2's only stage."""
    ours, theirs = [setting.weights(simulated=False)], [setting.weights(simulated=False, window=1)]
    peers = {
        "beagle": setting.step(setting.stage_one, ours, True),
        "EAGLE-2": setting.step(setting.eagle_step, theirs, True),
    }
    return _case(setting, "training step without simulation", peers, lambda: _finite(peers))


def _case(setting: Setting, name: str, peers: dict, check: Callable[[], None], **options) -> Case:
    rows, device = len(setting.batch.tokens), setting.batch.tokens.device.type

    def peak(name: str) -> dict:
        return {"peak_bytes": peak_memory(peers[name], torch.device(device))}

    at: dict[str, object] = {"rows": rows, "products": "bf16" if isinstance(setting, Autocast) else "fp32"}
    return Case(f"{name}, {rows} rows", peers, check, rounds=7, device=device, notes=peak, at=at, **options)


def _finite(peers: dict) -> None:
    for name, peer in peers.items():
        assert all(part.isfinite().all() for part in peer()), f"{name}: a loss or gradient is not finite"
