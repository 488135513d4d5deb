"""`beagle-sd bench`: whole answers of every contender on the same prompts, timed side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from beagle_sd.cli.console import (
    Calibrate,
    Device,
    DraftFolder,
    Dtype,
    TargetName,
    Temperature,
    Weights,
    clear_errors,
    console,
    dtype_of,
    loading,
    measured_tree,
    progress_bar,
)
from beagle_sd.data.chats import check_template
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.evaluation.comparison import Row, compare_on, write_csv
from beagle_sd.evaluation.plot import blank_figure, plot_comparison
from beagle_sd.models.loading import bundled_folder, load_draft, load_target

_LEGEND = (
    "x: seconds a token of target.generate over the contender's, prefill included, prompt by prompt. At least: the "
    "median's 95% lower bound by the sign test. Predicted: tokens a round by calibrated costs; decode: the same "
    "measured, prefill left out. Peak: memory held while it answered the longest prompt, weights included (on a CPU "
    "the whole process's)."
)


def bench(
    target: TargetName = "smollm2-135m",
    draft: DraftFolder = None,
    prompts: Annotated[
        list[str],
        typer.Option(
            help="mt-bench, humaneval, gsm8k, editing, a .jsonl of conversations or a .txt "
            "of one prompt a line; may be given again."
        ),
    ] = ["mt-bench"],  # noqa: B006
    count: Annotated[int, typer.Option(help="Prompts of each.")] = 20,
    raw: Annotated[bool, typer.Option(help="Continue the prompts themselves, without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Temperature = 0.0,
    assistant: Annotated[str | None, typer.Option(help="A smaller model for transformers' own speculation.")] = None,
    tree: Annotated[
        list[str],
        typer.Option(
            help="A tree to measure, depth,branch,num_nodes as 4,4,8; may be given again. "
            "Default: the best chain and tree by costs."
        ),
    ] = [],  # noqa: B006
    calibrate: Calibrate = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios there; needs matplotlib.")] = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = None,
) -> None:
    """Time whole answers side by side: target.generate, transformers' speculation, Beagle's plain, chain and trees."""
    with clear_errors():
        shapes = [TreeShape.parse(text) for text in tree]
        if plot is not None:
            blank_figure(1, 1)  # what it needs is missed now, not after the measuring
        folder = Path(draft) if draft else bundled_folder(target)
        with loading(console, target):
            model, tokenizer = load_target(target, dtype=dtype_of(dtype), device=device, weights=weights)
            loaded = load_draft(folder, model, weights=weights)
            if not raw:
                check_template(tokenizer)
            helper = load_target(assistant, dtype=model.dtype, device=model.device)[0] if assistant else None
        adaptive = measured_tree(model, loaded, calibrate)
        with progress_bar(console) as progress:
            bars = {source: progress.add_task(source, total=None) for source in prompts}
            rows, _ = compare_on(
                prompts,
                model,
                tokenizer,
                loaded,
                adaptive,
                count=count,
                raw=raw,
                shapes=shapes,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                assistant=helper,
                on_progress=lambda source, done, total: progress.update(bars[source], completed=done, total=total),
            )
        for source in prompts:
            console.print(comparison_table(source, [row for row in rows if row.prompts == source]))
        console.print(_LEGEND, style="dim", highlight=False)
        if csv is not None:
            write_csv(rows, csv)
        if plot is not None:
            plot_comparison(rows, plot)


def comparison_table(source: str, rows: list[Row]) -> Table:
    """The rows of one set of prompts."""
    titles = (
        "contender",
        "ms a token",
        "tokens a round",
        "x median (20%, 80%)",
        "at least",
        "predicted",
        "decode",
        "peak GB",
    )
    table = Table(*titles, title=f"{source}, {rows[0].answers} prompts")
    for row in rows:
        peak = None if row.peak_bytes is None else row.peak_bytes / 1e9
        tokens, bound, predicted, decode, memory = (
            "" if value is None else f"{value:.2f}"
            for value in (row.tokens_per_round, row.bound, row.predicted, row.decode, peak)
        )
        ratio = f"{row.median:.2f} ({row.low:.2f}, {row.high:.2f})"
        table.add_row(row.contender, f"{row.ms_per_token:.1f}", tokens, ratio, bound, predicted, decode, memory)
    return table
