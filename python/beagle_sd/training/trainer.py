"""Two-Stage Block-Attention Training (paper: section 3.3): steps, evaluation, checkpoints that resume."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beagle_kernels import distill_loss
from beagle_sd.data.dataset import Entry, PackedDataset
from beagle_sd.evaluation.plot import whole_lines
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.objective import Batch, draft_states, row_weights
from beagle_sd.training.parallel import mean_gradients, own, shares, summed


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a run; the defaults are the paper's, for a 7B target. Small targets want a higher lr.

    window, steps: positions a window has in stage 1 (block attention; 1 is plain next-token training) and in
    stage 2 (simulation); block_epochs, simulation_epochs may be fractions; tokens_per_step is a batch's size over
    all processes; micro_batches: the parts, one after the other, in which a process does its share; schedule
    "constant" or "cosine" (to a tenth) after warm-up; noise is the standard deviation of Gaussian noise on the
    states that give the keys; eval_steps, save_steps: every so many steps.
    """

    window: int = 5
    steps: int = 4
    block_epochs: float = 10.0
    simulation_epochs: float = 10.0
    tokens_per_step: int = 32768
    micro_batches: int = 1
    context: int = 2048
    lr: float = 3e-5
    schedule: str = "constant"
    warmup_steps: int = 2000
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5
    regression: float = 10.0
    noise: float = 0.0
    detach_states: bool = False
    autocast: bool = False
    held_out: int = 50
    eval_steps: int = 500
    eval_tokens: int = 16384
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in ("window", "steps", "tokens_per_step", "micro_batches", "context", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        for name in ("block_epochs", "simulation_epochs", "lr", "warmup_steps", "regression", "noise", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; allowed: 'constant', 'cosine'")


class TrainingStopped(RuntimeError):
    """The loss is not finite; the last good checkpoint is kept."""


class Trainer:
    """Trains `draft` on `dataset` and keeps checkpoints under `folder`; begins again where the last one stands.

    Under `torchrun` or `accelerate launch` every process makes the same trainer and does its share of each batch.
    states: how the draft's states are had, with the arguments of `draft_states`; another kind of draft brings its own.
    tensorboard: also write the metrics for TensorBoard.
    """

    def __init__(
        self,
        draft: BeagleDraft,
        dataset: PackedDataset,
        folder: str | Path,
        config: TrainingConfig,
        *,
        states: Callable[..., Tensor] = draft_states,
        tensorboard: bool = False,
    ):
        self.draft, self.dataset, self.config, self.states = draft, dataset, config, states
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = draft.q_proj.weight.device
        self.processes = PartialState(cpu=self.device.type == "cpu")
        # In autocast the loss's products are in bf16, as the draft's are.
        self.head = draft.head.to(torch.bfloat16 if config.autocast else torch.float32)
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(
            draft.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, **fused
        )
        if not dataset.train:
            raise ValueError(
                f"no sequence to train on: all {len(dataset.evaluation)} are held out "
                f"(held_out={config.held_out}; 0 holds none out)"
            )
        if dataset.width != draft.config.hidden_size:
            raise ValueError(
                f"the states are {dataset.width} wide; allowed: the draft's hidden_size, {draft.config.hidden_size}"
            )
        per_epoch = len(dataset.epoch(0, config.tokens_per_step, config.seed))
        self.block_steps = round(config.block_epochs * per_epoch)
        self.total_steps = self.block_steps + round(config.simulation_epochs * per_epoch)
        self.step = 0
        self.tokens_seen = 0
        self._epochs: dict[int, list[list[int]]] = {}
        self._choices: dict[int, Tensor] = {}
        self._resume()
        self._writer = self._tensorboard() if tensorboard and self.processes.is_main_process else None

    def run(self, progress: Callable[[int, dict], None] = lambda step, metrics: None) -> None:
        """Train to the end, calling progress(step, metrics) after every step."""
        self.draft.train()
        while self.step < self.total_steps:
            began = time.perf_counter()
            metrics = self._train_step()
            metrics["seconds"] = time.perf_counter() - began
            self.step += 1
            if self.step % self.config.eval_steps == 0 or self.step in (self.block_steps, self.total_steps):
                metrics["acceptance_by_depth"] = self.evaluate()
            self._log(metrics)
            if self.step % self.config.save_steps == 0 or self.step == self.total_steps:
                self.save()
            progress(self.step, metrics)
        if self.processes.is_main_process:
            self._write(self.folder / "final", self.draft.save_pretrained)
        self.processes.wait_for_everyone()

    @torch.no_grad()
    def evaluate(self, depth: int = 6) -> list[float]:
        """Acceptance by depth on held-out windows (the paper's figure 3): the share of windows in which the
        draft's first choice equals the target's at row m, among those where it did at all rows before."""
        self.draft.eval()
        counts = torch.zeros(2, depth, device=self.device)
        packs = self.dataset.evaluation_packs(self.config.tokens_per_step, self.config.eval_tokens)
        for number, entries in own(list(enumerate(packs))):
            batch = self._move(self.dataset.load(entries))
            if number not in self._choices:
                self._choices[number] = self._target_choices(batch)
            offset = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.int32, device=self.device)
            with self._autocast():
                states = self.states(self.draft, batch, batch.states, depth, offset, simulated=True)
            counted = row_weights(batch, depth, offset, simulated=False) > 0
            matches = self._agreement(states, self._choices[number], counted)
            for m in range(depth):
                rows = ((batch.positions % depth == m) & counted).nonzero().flatten()
                rows = rows[rows >= m]
                whole = torch.stack([matches[rows - i] for i in range(m + 1)])
                counts[0, m] += whole[1:].all(0).sum() if m else len(rows)
                counts[1, m] += whole.all(0).sum()
        self.draft.train()
        reached, accepted = summed(counts).cpu()
        return [round(value, 4) for value in (accepted / reached.clamp(min=1)).tolist()]

    def _target_choices(self, batch: Batch) -> Tensor:
        """[T] int64: the target's first choice over the whole vocabulary in the rows of the loss, elsewhere -1."""
        choices = torch.full_like(batch.tokens, -1)
        head = self.draft.target.head.weight.float()
        for rows in batch.loss_mask.nonzero().flatten().split(512):
            choices[rows] = (batch.states[rows].float() @ head.T).argmax(-1)
        return choices

    def _agreement(self, states: Tensor, choices: Tensor, counted: Tensor) -> Tensor:
        """[T] bool: the draft's first choice is the target's."""
        matches = torch.zeros(len(states), dtype=torch.bool, device=self.device)
        head = self.draft.head.float()
        for rows in counted.nonzero().flatten().split(512):
            mine = (states[rows].float() @ head.T).argmax(-1)
            if self.draft.draft_vocab is not None:
                mine = self.draft.draft_vocab[mine]
            matches[rows] = mine == choices[rows]
        return matches

    def _train_step(self) -> dict:
        config, stage = self.config, 2 if self.step >= self.block_steps else 1
        window = config.steps if stage == 2 else config.window
        entries = self._next_entries()
        offsets = torch.randint(window, (len(entries),), generator=self._generator(), dtype=torch.int32)
        lengths = [min(entry.rows, config.context) for entry in entries]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for part in own(shares(lengths, self.processes.num_processes * config.micro_batches)):
            if part:
                batch = self.dataset.load([entries[place] for place in part])
                noise = self._noise(part, lengths, batch.states.shape[1])
                offset = offsets[part].to(self.device, non_blocking=True)
                sums += self._backward(self._move(batch), offset, noise, stage, window)
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
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens_seen += int(tokens)
        return {"stage": stage, "loss": loss, "gradient_norm": norm, "lr": self._lr(), "tokens_seen": self.tokens_seen}

    def _backward(self, batch: Batch, offset: Tensor, noise: Tensor | None, stage: int, window: int) -> Tensor:
        """Add a micro-batch's gradients; returns (sum of losses, their weight, tokens) float64."""
        config, keys_of = self.config, batch.states.float()
        if noise is not None:
            keys_of = keys_of + noise.to(self.device, non_blocking=True)
        weights = row_weights(batch, window, offset, simulated=stage == 2)
        with self._autocast():
            states = self.states(
                self.draft, batch, keys_of, window, offset, simulated=stage == 2, detach_states=config.detach_states
            )
        made, wanted = states.to(self.head.dtype), batch.states.to(self.head.dtype)
        loss = distill_loss(made, wanted, self.head, weights, regression=config.regression, tf32=True)
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
        drawn = [torch.randn(lengths[place], width, generator=self._generator(place)) for place in part]
        return self.config.noise * torch.cat(drawn)

    def _lr(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.lr * (self.step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return config.lr
        done = (self.step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
        return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def _next_entries(self) -> list[Entry]:
        per_epoch = len(self._epoch(0))
        epoch, step = 0, self.step
        while step >= per_epoch:
            step -= per_epoch
            epoch += 1
            per_epoch = len(self._epoch(epoch))
        return [self.dataset.train[number] for number in self._epoch(epoch)[step]]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self.dataset.epoch(epoch, self.config.tokens_per_step, self.config.seed)
        return self._epochs[epoch]

    def _move(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.device, non_blocking=True) for part in batch))

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.autocast else nullcontext()

    def _log(self, metrics: dict) -> None:
        if not self.processes.is_main_process:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        if self._writer is not None:
            for name in ("loss", "gradient_norm", "lr", "tokens_seen", "seconds"):
                self._writer.add_scalar(name, metrics[name], self.step)
            for depth, share in enumerate(metrics.get("acceptance_by_depth", [])):
                self._writer.add_scalar(f"acceptance/depth_{depth}", share, self.step)
            self._writer.flush()

    def _tensorboard(self):
        """A writer that drops what was logged of steps that will be run again."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def save(self) -> Path:
        """Write a checkpoint; it appears whole or not at all, and all but the last two are removed after."""
        final = self.folder / f"checkpoint-{self.step:07d}"

        def write(folder: Path) -> None:
            self.draft.save_pretrained(folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            state = {"step": self.step, "tokens_seen": self.tokens_seen, "settings": self._settings()}
            (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

        if self.processes.is_main_process:
            self._write(final, write)
            for old in checkpoints(self.folder)[:-2]:
                shutil.rmtree(old)
        self.processes.wait_for_everyone()
        return final

    def _write(self, final: Path, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder beside `final`, then give it that name."""
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            try:
                write(partial)
            except (OSError, RuntimeError, SafetensorError) as error:  # as the writers of tensors report a full disk
                raise OSError(
                    f"{final} could not be written ({error}); is the disk full? What was written before is "
                    "kept, and the same command goes on from there"
                ) from error
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _settings(self) -> dict:
        """All that a resumed run must share with the one before."""
        shape = self.draft.config.to_dict()
        names = (
            "model_type",
            "target_type",
            "hidden_size",
            "vocab_size",
            "draft_vocab_size",
            "num_key_value_heads",
            "append_states",
            "norm_query",
            "norm_state",
            "norm_output",
        )
        data = {"sequences": len(self.dataset.train), "tokens": self.dataset.tokens_of(self.dataset.train)}
        return asdict(self.config) | {"betas": list(self.config.betas)} | data | {name: shape[name] for name in names}

    def _resume(self) -> None:
        if self.processes.is_main_process:
            for remains in self.folder.glob(".*.partial"):
                shutil.rmtree(remains)
        self.processes.wait_for_everyone()
        if found := checkpoints(self.folder):
            self._load(found[-1])
        if self.processes.is_main_process:
            self._forget_after(self.step)

    def _load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            moments = torch.load(folder / "optimizer.pt", map_location=self.device)
        except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{folder} is not a whole checkpoint ({error}); delete it to go on from the one before"
            ) from error
        was, now = state["settings"], self._settings()
        if differing := [f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]:
            raise ValueError(
                f"{folder} was trained with other settings ({', '.join(differing)}); use the same, or a new folder"
            )
        if self.draft.draft_vocab is not None and not torch.equal(weights["draft_vocab"], self.draft.draft_vocab.cpu()):
            raise ValueError(f"{folder} was trained with another draft_vocab; use the same, or a new folder")
        self.draft.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]

    def _forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be run again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in whole_lines(path) if line["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a training folder, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if (path / "trainer.json").is_file())
