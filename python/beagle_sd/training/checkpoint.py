"""Checkpoints of a run, whole or not at all, and what a resumed run must share with the one before."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from beagle_sd.files import remove_remains, whole
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.training.optimizer import Optimizer

_OF_THE_DRAFT = (
    "model_type",
    "target_type",
    "hidden_size",
    "vocab_size",
    "draft_vocab_size",
    "num_key_value_heads",
    "append_states",
    "window_keys",
    "norm_query",
    "norm_state",
    "norm_output",
)


class Checkpoints:
    """Saves `draft` and `optimizer` under `folder` and loads them again; the last two checkpoints are kept.

    settings: what a resumed run must share besides the draft's shape.
    """

    KEPT = 2

    def __init__(self, folder: Path, draft: BeagleDraft, optimizer: Optimizer, settings: dict):
        self.folder, self.draft, self.optimizer = folder, draft, optimizer
        shape = draft.config.to_dict()
        self.settings = settings | {name: shape[name] for name in _OF_THE_DRAFT}
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:07d}"

    def save(self, step: int, tokens_seen: int) -> None:
        """Write a checkpoint, then remove the oldest."""

        def write(folder: Path) -> None:
            self.draft.save_pretrained(folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            state = {"step": step, "tokens_seen": tokens_seen, "settings": self.settings}
            (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

        self._write(self.path(step), write)
        for old in checkpoints(self.folder)[: -self.KEPT]:
            shutil.rmtree(old)

    def save_final(self) -> None:
        """Write the draft alone, as `final`."""
        self._write(self.folder / "final", self.draft.save_pretrained)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            with whole(path) as partial:
                write(partial)
        except (OSError, RuntimeError, SafetensorError) as error:  # as the writers of tensors report a full disk
            raise OSError(
                f"{path} could not be written ({error}); is the disk full? What was written before is kept, and the "
                "same command goes on from there"
            ) from error

    def remove_remains(self) -> None:
        """Remove what a killed run left half written."""
        remove_remains(self.folder)

    def load_last(self) -> tuple[int, int]:
        """Put the last checkpoint into draft and optimizer: the steps done and tokens seen, (0, 0) without one.

        ValueError for a checkpoint that is not whole, or of a run with other settings.
        """
        found = checkpoints(self.folder)
        return self._load(found[-1]) if found else (0, 0)

    def _load(self, folder: Path) -> tuple[int, int]:
        try:
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            moments = torch.load(folder / "optimizer.pt", map_location=self.draft.device)
        except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{folder} is not a whole checkpoint ({error}); delete it to go on from the one before"
            ) from error
        was, now = state["settings"], self.settings
        if differing := [f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]:
            raise ValueError(
                f"{folder} was trained with other settings ({', '.join(differing)}); use the same, or a new folder"
            )
        if self.draft.draft_vocab is not None and not torch.equal(weights["draft_vocab"], self.draft.draft_vocab.cpu()):
            raise ValueError(f"{folder} was trained with another draft_vocab; use the same, or a new folder")
        self.draft.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)
        return state["step"], state["tokens_seen"]


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a training folder, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if (path / "trainer.json").is_file())
