"""The metrics of a training run, a line a step: metrics.jsonl, and TensorBoard if asked for."""

from __future__ import annotations

import json
from pathlib import Path

from beagle_sd.files import whole

_SCALARS = ("loss", "gradient_norm", "lr", "tokens_seen", "seconds")


class TrainingLog:
    """Writes a run's metrics to its folder, after `step` steps; what was logged of later ones, which will be run again,
    is dropped."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in whole_lines(self.path) if line["step"] <= step]
            with whole(self.path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, metrics: dict) -> None:
        """The metrics of a step: loss, gradient_norm, lr, tokens_seen, seconds, and acceptance_by_depth if measured."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer is not None:
            for name in _SCALARS:
                self._writer.add_scalar(name, metrics[name], step)
            for depth, share in enumerate(metrics.get("acceptance_by_depth", [])):
                self._writer.add_scalar(f"acceptance/depth_{depth}", share, step)
            self._writer.flush()


def read_log(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last line cut short is left out. ValueError where there is none."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there; allowed: a folder that `beagle-sd train` wrote")
    lines = whole_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: no step has ended yet")
    return lines


def whole_lines(path: Path) -> list[dict]:
    """The lines of a log, without a last one that a killed run cut short."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
