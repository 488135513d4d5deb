"""Target states on disk: safetensors shards in half precision, and the manifest that says what they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beagle_sd.files import remove_remains, whole, write_json

FORMAT = 1
_NAMES = ("tokens", "loss_mask", "states", "lengths", "final_token", "index", "temperature")


class Sequence(NamedTuple):
    """One conversation with the target's states.

    tokens [n] int64; states [n, d], row i the target's top hidden state at token i; loss_mask [n] bool, row i
    set where the token after i is the assistant's; final_token, the token after the last row (-1: none);
    index, the number of the prompt or conversation it came from; temperature, -1 where a person wrote it.
    kept [n] bool: which rows have their states, of which `states` then has no others (None: all).
    """

    tokens: Tensor
    loss_mask: Tensor
    states: Tensor
    final_token: int
    index: int  # type: ignore[assignment]  # tuple.index is not needed
    temperature: float
    kept: Tensor | None = None

    def within(self, window_keys: int) -> Sequence:
        """With the states alone that lie within `window_keys` positions before a row that is learnt, and its own."""
        before = self.loss_mask.long().cumsum(0)
        reach = torch.arange(len(before)) + window_keys
        until = before[reach.clamp(max=len(before) - 1)]
        kept = until - before + self.loss_mask.long() > 0
        return self._replace(states=self.states[kept], kept=kept)


class ShardError(ValueError):
    """A shard or manifest is missing, cut short, or of another target; the message names the file."""


class ShardWriter:
    """Collects sequences and writes a shard at every `tokens_per_shard`; a shard appears whole or not at all.

    Several processes may each write their own sequences into one folder: number `process` of `processes`.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict,
        tokens_per_shard: int = 100_000,
        *,
        process: int = 0,
        processes: int = 1,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_remains(self.folder)
        self.tokens_per_shard, self.process, self.processes = tokens_per_shard, process, processes
        self._open: list[Sequence] = []
        self._tokens = 0
        _merge_manifest(self.folder / "manifest.json", manifest)

    def add(self, sequence: Sequence) -> None:
        """Take one sequence; its states are stored as they come, in bf16 or fp16."""
        self._open.append(sequence)
        self._tokens += len(sequence.tokens)
        if self._tokens >= self.tokens_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as the next shard."""
        if not self._open:
            return
        tensors = {
            "tokens": torch.cat([s.tokens for s in self._open]).to(torch.int32),
            "loss_mask": torch.cat([s.loss_mask for s in self._open]).to(torch.uint8),
            "states": torch.cat([s.states for s in self._open]),
            "lengths": torch.tensor([len(s.tokens) for s in self._open], dtype=torch.int32),
            "final_token": torch.tensor([s.final_token for s in self._open], dtype=torch.int32),
            "index": torch.tensor([s.index for s in self._open], dtype=torch.int32),
            "temperature": torch.tensor([s.temperature for s in self._open], dtype=torch.float32),
        }
        number = 1 + max((int(path.stem.split("-")[1]) for path in shard_paths(self.folder)), default=-1)
        number += (self.process - number) % self.processes  # no other process takes it
        path = self.folder / f"states-{number:05d}.safetensors"
        if any(s.kept is not None for s in self._open):
            kept = [torch.ones(len(s.tokens), dtype=torch.bool) if s.kept is None else s.kept for s in self._open]
            tensors["kept"] = torch.cat(kept).to(torch.uint8)
        try:
            with whole(path) as partial:
                save_file(tensors, partial, metadata={"format": str(FORMAT)})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{path} could not be written ({error}); is the disk full? The shards before are kept, and "
                "the same command goes on from there"
            ) from error
        self._open, self._tokens = [], 0


def shard_paths(folder: str | Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(Path(folder).glob("states-[0-9]*.safetensors"))


def written_paths(folder: str | Path) -> list[Path]:
    """Files of answers whose states are still to come, in order, which `--engine vllm` leaves there meanwhile."""
    return sorted(Path(folder).glob("written-[0-9]*.npz"))


def read_manifest(folder: str | Path) -> dict:
    """What the shards are of; ShardError if it is missing or unreadable."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{path} is missing: {folder} is not a folder made by `beagle-sd prepare`") from None
    except json.JSONDecodeError as error:
        raise ShardError(f"{path} is not JSON ({error}): run `beagle-sd prepare` again into a new folder") from error


def check_manifest(folder: str | Path, **expected) -> dict:
    """The manifest, after comparing the given fields; ShardError names the first that differs."""
    manifest = read_manifest(folder)
    for key, want in expected.items():
        if manifest.get(key) != want:
            raise ShardError(f"{folder} holds states with {key}={manifest.get(key)!r}; this target has {want!r}")
    return manifest


def read_shard(path: str | Path, *, with_states: bool = True) -> list[Sequence]:
    """The sequences of a shard; ShardError if the file is cut short or lacks a tensor."""
    try:
        with safe_open(path, "pt") as file:
            every = [*_NAMES, *({"kept"} & set(file.keys()))]
            names = [name for name in every if with_states or name != "states"]
            shapes = {name: file.get_slice(name).get_shape() for name in every}
            data = {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise ShardError(
            f"{path} is not a whole shard ({error}); delete it and run `beagle-sd prepare` again"
        ) from error
    lengths = data["lengths"].tolist()
    _check_parts(path, data, shapes, lengths)
    kept = [part.bool() for part in data["kept"].split(lengths)] if "kept" in data else [None] * len(lengths)
    rows = [length if part is None else int(part.sum()) for length, part in zip(lengths, kept)]
    states = data["states"].split(rows) if with_states else [torch.empty(0)] * len(lengths)
    return [
        Sequence(tokens.long(), mask.bool(), state, final, index, temperature, part)
        for tokens, mask, state, final, index, temperature, part in zip(
            data["tokens"].split(lengths),
            data["loss_mask"].split(lengths),
            states,
            data["final_token"].tolist(),
            data["index"].tolist(),
            data["temperature"].tolist(),
            kept,
            strict=True,
        )
    ]


def _check_parts(path: str | Path, data: dict[str, Tensor], shapes: dict[str, list[int]], lengths: list) -> None:
    """ShardError unless a shard's parts belong together."""
    if data["lengths"].dtype.is_floating_point or data["tokens"].dtype.is_floating_point:
        raise ShardError(f"{path}: lengths or tokens are not integers; delete it and run `beagle-sd prepare` again")
    if len(shapes["lengths"]) != 1 or min(lengths, default=0) < 0 or [sum(lengths)] != shapes["tokens"]:
        raise ShardError(
            f"{path}: lengths add up to {sum(lengths)} or are negative; its tokens have shape {shapes['tokens']}"
        )
    rows, sequences = shapes["tokens"][0], shapes["lengths"][0]
    wanted = {
        "loss_mask": [rows],
        "states": [int(data["kept"].count_nonzero()) if "kept" in data else rows, shapes["states"][-1]],
        **({"kept": [rows]} if "kept" in data else {}),
        **dict.fromkeys(("final_token", "index", "temperature"), [sequences]),
    }
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ShardError(f"{path}: {name} has shape {shapes[name]}; allowed: {shape}")


def read_sequences(folder: str | Path, *, with_states: bool = True) -> Iterator[Sequence]:
    """All sequences of a folder, shard by shard."""
    for path in shard_paths(folder):
        yield from read_shard(path, with_states=with_states)


def _merge_manifest(path: Path, manifest: dict) -> None:
    """Write the manifest, or check that the one there, of an earlier part of the same work, is equal; one without a
    shard or answers is of work that never began."""
    manifest = {"format": FORMAT, **manifest}
    if path.exists() and (shard_paths(path.parent) or written_paths(path.parent)):
        have = {"engine": "own", **read_manifest(path.parent)}  # older ones do not name it
        for key, value in manifest.items():
            if have.get(key) != value:
                raise ShardError(
                    f"{path.parent} was begun with {key}={have.get(key)!r}, not {value!r}; "
                    "use a new folder, or the same arguments to go on"
                )
        return
    write_json(path, manifest)
