"""What every part is given: the folder it works in, how much of everything, its minutes and the device."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from beagle_sd.files import write_json
from bench.environment import environment
from bench.recipes.one_gpu.recipe import BASE, Sizes

SETUP = "setup --kit FOLDER"


class OutOfTime(Exception):
    """The part's time is used up; what it has is saved."""


class Budget:
    """A part's minutes, of which `late` seconds were over when it began; the last 3% are for saving."""

    clock = staticmethod(time.monotonic)

    def __init__(self, minutes: float, late: float = 0.0):
        self.began, self.seconds = self.clock(), 0.97 * 60.0 * minutes - late

    @property
    def spent(self) -> float:
        return self.clock() - self.began

    def need(self, seconds: float = 0.0) -> None:
        """OutOfTime unless so many seconds are left."""
        if self.spent + seconds > self.seconds:
            raise OutOfTime


class OutFolder:
    """OUT: what every part made is in OUT/PART, in files of less than 16 MiB; OUT/kit and OUT/scratch stay on the
    machine."""

    def __init__(self, path: Path):
        self.path, self.kit, self.scratch = path, path / "kit", path / "scratch"

    def part(self, name: str) -> Path:
        """The folder of a part, made if need be."""
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name

    def require(self, path: Path, part: str) -> Path:
        """The path, which `part` makes; FileNotFoundError says so where it is not there."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: run `bench/recipes/one_gpu.sh {self.path} {part}` first")
        return path

    def target_name(self) -> str:
        """ "target" where the kit brought a folder."""
        return json.loads(self.require(self.kit / "about.json", SETUP).read_text(encoding="utf-8"))["target"]

    def prompts_file(self) -> Path:
        """The kit's prompts."""
        return self.require(self.kit / "prompts.npz", SETUP)

    def answer_files(self) -> list[Path]:
        """What the part `answers` wrote."""
        self.require(self.path / "answers" / "answers-00.npz", "answers")
        return sorted((self.path / "answers").glob("answers-[0-9]*.npz"))

    def settings(self) -> dict:
        """What the search chose; the bundled draft's settings where it has not run."""
        best = self.path / "search" / "best.json"
        return json.loads(best.read_text(encoding="utf-8"))["settings"] if best.is_file() else BASE


@dataclass(frozen=True)
class Job:
    """One part's."""

    out: OutFolder
    sizes: Sizes
    budget: Budget
    device: str

    def record(self, part: str, **found) -> None:
        """Write what a part has to report into OUT/PART/record.json."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        about = {"seconds": round(self.budget.spent, 1), "peak_bytes": peak, "environment": environment()}
        write_json(self.out.part(part) / "record.json", {"part": part, **found, **about})
