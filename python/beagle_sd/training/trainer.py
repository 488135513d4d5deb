"""Two-Stage Block-Attention Training (paper: section 3.3): steps that resume where the last checkpoint stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from beagle_kernels import distill_loss
from beagle_sd.data.batch import Batch
from beagle_sd.data.dataset import Entry, PackedDataset
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.checkpoint import Checkpoints
from beagle_sd.training.config import TrainingConfig
from beagle_sd.training.held_out import HeldOut
from beagle_sd.training.log import TrainingLog
from beagle_sd.training.objective import draft_states, row_weights
from beagle_sd.training.optimizer import Optimizer
from beagle_sd.training.parallel import mean_gradients, of_this_process, shares, summed


class TrainingStopped(RuntimeError):
    """The loss is not finite; the last good checkpoint is kept."""


class Trainer:
    """Trains `draft` on `dataset` and keeps checkpoints under `folder`; begins again where the last one stands.

    Under `torchrun` or `accelerate launch` every process makes the same trainer and does its share of each batch.
    states: how the draft's states are had, with the arguments of `draft_states`; another kind of draft brings its own.
    loss, weights: what is learnt, with the arguments of `distill_loss` (regression and tf32 by name), and what each row
    counts, with those of `row_weights`: the same for all of a folder's training.
    tensorboard: also write the metrics for TensorBoard. Raises ValueError where there is nothing to train on, for
    states or a checkpoint that do not fit the draft or the config, and for a window or steps beyond its window_keys.
    """

    def __init__(
        self,
        draft: BeagleDraft,
        dataset: PackedDataset,
        folder: str | Path,
        config: TrainingConfig,
        *,
        states: Callable[..., Tensor] = draft_states,
        loss: Callable[..., Tensor] = distill_loss,
        weights: Callable[..., Tensor] = row_weights,
        tensorboard: bool = False,
    ):
        _check_fits(draft, dataset, config)
        self.draft, self.dataset, self.config = draft, dataset, config
        self.states, self.loss, self.weights = states, loss, weights
        self.folder, self.device = Path(folder), draft.device
        self.processes = PartialState(cpu=self.device.type == "cpu")
        # In autocast the loss's products are in bf16, as the draft's are.
        self.head = draft.head.to(torch.bfloat16 if config.autocast else torch.float32)
        self.optimizer = Optimizer(draft, config)
        self._epochs: dict[int, list[list[int]]] = {}
        self.block_steps = round(config.block_epochs * len(self._epoch(0)))
        self.total_steps = self.block_steps + round(config.simulation_epochs * len(self._epoch(0)))
        tokens = {"tokens_per_pack": config.tokens_per_step, "tokens": config.eval_tokens}
        self.held_out = HeldOut(draft, dataset, self._draft_states, **tokens)
        data = {"sequences": len(dataset.train), "tokens": dataset.tokens_of(dataset.train)}
        settings = asdict(config) | {"betas": list(config.betas)} | data
        self.checkpoints = Checkpoints(self.folder, draft, self.optimizer, settings)
        self.log: TrainingLog | None = None
        self._resume(tensorboard)

    def _resume(self, tensorboard: bool) -> None:
        main = self.processes.is_main_process
        if main:
            self.checkpoints.remove_remains()
        self.processes.wait_for_everyone()
        self.step, self.tokens_seen = self.checkpoints.load_last()
        if main:
            self.log = TrainingLog(self.folder, self.step, tensorboard=tensorboard)

    def run(self, progress: Callable[[int, dict], None] = lambda step, metrics: None) -> None:
        """Train to the end, calling progress(step, metrics) after every step."""
        self.draft.train()
        while self.step < self.total_steps:
            began = time.perf_counter()
            metrics = self.train_step()
            metrics["seconds"] = time.perf_counter() - began
            self.step += 1
            if self.step % self.config.eval_steps == 0 or self.step in (self.block_steps, self.total_steps):
                metrics["acceptance_by_depth"] = self.evaluate()
            if self.log is not None:
                self.log.add(self.step, metrics)
            if self.step % self.config.save_steps == 0 or self.step == self.total_steps:
                self.save()
            progress(self.step, metrics)
        if self.processes.is_main_process:
            self.checkpoints.save_final()
        self.processes.wait_for_everyone()

    def evaluate(self, depth: int = 6) -> list[float]:
        """Acceptance by depth on held-out windows (the paper's figure 3), as deep as the draft's window_keys allow."""
        self.draft.eval()
        depth = min(depth, self.draft.config.window_keys or depth)
        acceptance = self.held_out.acceptance(depth)
        self.draft.train()
        return acceptance

    def save(self) -> Path:
        """Write a checkpoint; it appears whole or not at all, and all but the last two are removed after."""
        if self.processes.is_main_process:
            self.checkpoints.save(self.step, self.tokens_seen)
        self.processes.wait_for_everyone()
        return self.checkpoints.path(self.step)

    def train_step(self) -> dict:
        """One step of the optimizer, its metrics; TrainingStopped where it is not finite. `run` is what trains: here
        `step` stays as it is, so that the next call takes the same batch."""
        config, stage = self.config, 2 if self.step >= self.block_steps else 1
        window = config.steps if stage == 2 else config.window
        entries = self._next_entries()
        offsets = torch.randint(window, (len(entries),), generator=self._generator(), dtype=torch.int32)
        lengths = [min(entry.rows, config.context) for entry in entries]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for part in of_this_process(shares(lengths, self.processes.num_processes * config.micro_batches)):
            if part:
                batch = self.dataset.load([entries[index] for index in part])
                noise = self._noise(part, lengths, batch.states.shape[1])
                offset = offsets[part].to(self.device, non_blocking=True)
                sums += self._backward(batch.to(self.device), offset, noise, stage, window)
        sums = summed(sums)
        mean_gradients(self.draft.parameters(), sums[1].clamp(min=1e-9))
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), config.clip)
        loss, weight, tokens, norm = torch.cat([sums, norm.double()[None]]).tolist()
        loss /= max(weight, 1e-9)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(
                f"step {self.step}: loss is {loss}, gradient norm {norm}; "
                f"the last good checkpoint is kept in {self.folder}; lower lr (now {config.lr})?"
            )
        rate = config.rate(self.step, self.total_steps)
        self.optimizer.step(rate)
        self.tokens_seen += int(tokens)
        return {"stage": stage, "loss": loss, "gradient_norm": norm, "lr": rate, "tokens_seen": self.tokens_seen}

    def _backward(self, batch: Batch, offset: Tensor, noise: Tensor | None, stage: int, window: int) -> Tensor:
        """Add a micro-batch's gradients; returns (sum of losses, their weight, tokens) float64."""
        config, keys_of = self.config, batch.states.float()
        if noise is not None:
            keys_of = keys_of + noise.to(self.device, non_blocking=True)
        weights = self.weights(batch, window, offset, simulated=stage == 2)
        states = self._draft_states(
            self.draft, batch, keys_of, window, offset, simulated=stage == 2, detach_states=config.detach_states
        )
        drafted, wanted = states.to(self.head.dtype), batch.states.to(self.head.dtype)
        loss = self.loss(drafted, wanted, self.head, weights, regression=config.regression, tf32=True)
        loss.backward()
        tokens = torch.full((), len(batch.tokens), dtype=torch.float64, device=self.device)
        return torch.stack([loss.detach().double(), weights.sum().double(), tokens])

    def _generator(self, sequence: int | None = None) -> torch.Generator:
        """The randomness of this step, or of one of its sequences: the same however the step is shared."""
        seed = self.config.seed * 1_000_003 + self.step
        return torch.Generator().manual_seed(seed if sequence is None else (seed * 65_537 + sequence + 1) % 2**63)

    def _noise(self, part: list[int], lengths: list[int], width: int) -> Tensor | None:
        if not self.config.noise:
            return None
        drawn = [torch.randn(lengths[index], width, generator=self._generator(index)) for index in part]
        return self.config.noise * torch.cat(drawn)

    def _next_entries(self) -> list[Entry]:
        epoch, step = 0, self.step
        while step >= len(self._epoch(epoch)):
            step -= len(self._epoch(epoch))
            epoch += 1
        return [self.dataset.train[number] for number in self._epoch(epoch)[step]]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self.dataset.epoch(epoch, self.config.tokens_per_step, self.config.seed)
        return self._epochs[epoch]

    def _draft_states(self, *args, **options) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.config.autocast else nullcontext()
        with autocast:
            return self.states(*args, **options)


def _check_fits(draft: BeagleDraft, dataset: PackedDataset, config: TrainingConfig) -> None:
    if not dataset.train:
        raise ValueError(
            f"no sequence to train on: all {len(dataset.evaluation)} are held out "
            f"(held_out={config.held_out}; 0 holds none out)"
        )
    if draft.is_int8:
        raise ValueError("the draft's weights are in int8; allowed: floating point (a target may be in int8)")
    if dataset.width != draft.config.hidden_size:
        raise ValueError(
            f"the states are {dataset.width} wide; allowed: the draft's hidden_size, {draft.config.hidden_size}"
        )
    for name in ("window", "steps"):
        length, most = getattr(config, name), draft.config.window_keys
        if most is not None and length > most:
            raise ValueError(
                f"{name} is {length}; allowed: up to the draft's window_keys, {most}: beyond, a row may see no key"
            )
    stored, window = dataset.window_keys, draft.config.window_keys
    if stored is not None and (window is None or window > stored):
        raise ValueError(
            f"the draft's window_keys is {window}, but only the states within {stored} positions before what is learnt "
            f"are stored; allowed: 1 to {stored}, or a folder made with a larger `beagle-sd prepare --window-keys`, or "
            "without"
        )
