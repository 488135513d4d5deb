"""`beagle-sd prompts`: training prompts for `prepare --regenerate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from beagle_sd.cli.console import Device, Seed, clear_errors, console, dtype_of, loading, waiting
from beagle_sd.data.prompts.build import build_prompts
from beagle_sd.data.prompts.sources import SOURCES
from beagle_sd.data.prompts.written import written_prompts
from beagle_sd.files import whole
from beagle_sd.models.loading import load_target


def prompts(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(help="How many.")] = 12000,
    mix: Annotated[
        list[str] | None, typer.Option(help=f"NAME=WEIGHT, again for each source: {', '.join(SOURCES)}.")
    ] = None,
    written_by: Annotated[
        str | None, typer.Option(help="A target that writes them all itself: smollm2-135m, a folder, or a hub name.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of that target: float32, bfloat16 or float16.", show_default="bfloat16")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Write training prompts from licence-clean sources, or by the target, for `prepare --regenerate`."""
    with clear_errors():
        if written_by is not None and mix:
            raise ValueError(f"written_by is {written_by} and mix {', '.join(mix)}; allowed: one of the two")
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None and written_by is None:
                raise ValueError(f"{name} is {value}; allowed only with --written-by, whose target it is for")
        missing: list[str] = []
        if written_by is not None:
            made = _written(written_by, count, seed, dtype or "bfloat16", device)
        else:
            with waiting(console, "gathering prompts"):
                made = build_prompts(count, seed, _weights(mix or []) or None, left_out=missing.append)
        for reason in missing:
            console.print(f"left out: {escape(reason)}", soft_wrap=True)
        if count and not made:
            raise ValueError(
                "no source of the mix has prompts; allowed: templates in the mix, or the files named above"
            )
        with whole(out) as partial:
            lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in made]
            partial.write_text("".join(lines), encoding="utf-8")
    filled = (
        "the target wrote no more of use" if written_by else "templates=WEIGHT in the mix fills what its sources lack"
    )
    short = f"; {filled}" if len(made) < count else ""
    console.print(f"{len(made)} prompts in {out}{short}")


def _written(name: str, count: int, seed: int, dtype: str, device: str | None) -> list[dict]:
    with loading(console, name):
        model, tokenizer = load_target(name, dtype=dtype_of(dtype), device=device)
    with waiting(console, f"{name} writes prompts"):
        return written_prompts(model, tokenizer, count, seed)


def _weights(mix: list[str]) -> dict[str, float]:
    weights = {}
    for entry in mix:
        name, _, weight = entry.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"mix is {entry!r}; allowed: NAME=WEIGHT, as in chats=0.25") from None
    return weights
