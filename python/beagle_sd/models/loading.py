"""Targets and drafts by name: what ships with the package, a folder, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from beagle_sd.models import smollm2
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.halved import halve_
from beagle_sd.models.layers.quantize import quantize_

WEIGHTS = ("auto", "floats", "int8")
"""What the linear layers may hold: the dtype's numbers, or integers with scales (`quantize_`), on a CPU."""
_FOLDER = Path(__file__).parents[1] / "bundled"


def bundled_names() -> list[str]:
    """The names `load_bundled` takes."""
    return sorted(path.name for path in _FOLDER.iterdir() if (path / "config.json").is_file())


def bundled_folder(name: str) -> Path:
    """The folder of a bundled draft, with its card; ValueError names those there are."""
    if name not in bundled_names():
        raise ValueError(
            f"no draft is bundled for {name!r}; allowed: {', '.join(bundled_names())}, or a draft of your own, which "
            "`beagle-sd train` makes and --draft names"
        )
    return _FOLDER / name


def load_bundled(
    name: str = smollm2.NAME,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    weights: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BeagleDraft]:
    """(target, tokenizer, draft) of a bundled draft; the target is converted into the user's cache on first use.

    device None: the GPU if there is one; dtype None: bf16 on a GPU, fp32 on a CPU; weights "int8": the linear layers of
    both in int8, on a CPU; "auto": on a CPU in fp32 in 16 bits too, where nothing is lost by it (`halve_`); "floats": of
    the dtype alone.
    """
    folder = bundled_folder(name)
    target, tokenizer = load_target(name, dtype=dtype, device=device, weights=weights)
    return target, tokenizer, load_draft(folder, target, weights=weights)


def load_target(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    weights: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target and its tokenizer: "smollm2-135m", a folder, or a hub name; ValueError for a device that is not there,
    FileNotFoundError for a folder without a model. weights as in `load_bundled`."""
    _check_weights(weights)
    device = _device(device)
    if weights == "int8" and device.type != "cpu":
        raise ValueError(f"weights are 'int8' on {str(device)!r}; allowed: on 'cpu', or 'floats'")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    path = target_path(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval()  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return _as(weights, model, quantize_), tokenizer


def _as(weights: str, model: Any, quantize: Callable[[Any], Any]) -> Any:
    """A model with its weights as asked for: "auto" halves those in fp32 on a CPU."""
    if weights == "int8":
        return quantize(model)
    return halve_(model) if weights == "auto" and model.device.type == "cpu" and model.dtype == torch.float32 else model


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights are {weights!r}; allowed: {', '.join(WEIGHTS)}")


def load_outline(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target on the device "meta", all but its weights, and its tokenizer: for what another program runs. Errors as
    those of `load_target`."""
    path = target_path(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    with suppress(OSError):  # a folder without it has what its config says
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), tokenizer


def target_path(name: str | Path) -> str | Path:
    """The folder or hub name of a target; FileNotFoundError for a folder without a model."""
    path = smollm2.converted() if str(name) == smollm2.NAME else name
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json; allowed: a folder that save_pretrained wrote, a hub name, or {smollm2.NAME}"
        )
    return path


def _device(name: str | torch.device | None) -> torch.device:
    """The device asked for, else the GPU if there is one."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = ", ".join(["cpu", *(["cuda"] if cards else []), *(f"cuda:{card}" for card in range(cards))])
    try:
        device = torch.device(name or ("cuda" if cards else "cpu"))
    except RuntimeError:
        raise ValueError(f"device is {name!r}; allowed here: {allowed}") from None
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise ValueError(f"device is {str(device)!r}, which torch does not see; allowed here: {allowed}")
    return device


def load_draft(
    folder: str | Path, target: PreTrainedModel, dtype: torch.dtype | None = None, *, weights: str = "auto"
) -> BeagleDraft:
    """A saved draft, bound to `target` and on its device; in its dtype too where none is given. weights as in
    `load_bundled`; its head is the target's, whatever that holds."""
    _check_weights(weights)
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; allowed: a folder that `beagle-sd train` wrote")
    draft = BeagleDraft.from_pretrained(folder)
    draft.to(device=target.device, dtype=dtype or target.dtype).eval()
    return _as(weights, draft, BeagleDraft.quantize_).bind(target)


def measured_acceptance(folder: str | Path) -> list[dict]:
    """The tree shapes a draft was measured with, from its acceptance.json; empty if it was not. ValueError names a
    file that is none."""
    path = Path(folder) / "acceptance.json"
    if not path.is_file():
        return []
    needed = {"depth", "branch", "num_nodes", "temperature", "tokens_per_round"}
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
        if all(needed <= set(row) for row in shapes):
            return shapes
        error: Exception | str = f"a shape lacks one of {', '.join(sorted(needed))}"
    except (ValueError, KeyError, TypeError) as wrong:
        error = wrong
    raise ValueError(f"{path} is damaged ({error}); delete it: the draft works without")
