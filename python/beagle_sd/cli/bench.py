"""What `beagle-sd bench` does: load, compare, show."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from beagle_sd.cli.session import dtype_of, loading, measured_tree, progress_of
from beagle_sd.decoding.generate import TreeShape
from beagle_sd.evaluation.comparison import Row, compare_on, write_csv
from beagle_sd.evaluation.plot import blank_figure, plot_comparison
from beagle_sd.models.loading import bundled_folder, load_draft, load_target


def bench(
    console: Console,
    target_name: str,
    draft_folder: Path | None,
    sources: list[str],
    *,
    assistant: str | None,
    shapes: list[TreeShape],
    calibrate: bool,
    dtype: str,
    device: str | None,
    csv: Path | None,
    plot: Path | None,
    **settings,
) -> None:
    """Time whole answers of every contender on the same prompts, print the table, write CSV and plot."""
    if plot is not None:
        blank_figure(1, 1)  # what it needs is missed now, not after the measuring
    folder = Path(draft_folder) if draft_folder else bundled_folder(target_name)
    with loading(console, target_name):
        target, tokenizer = load_target(target_name, dtype=dtype_of(dtype), device=device)
        draft = load_draft(folder, target)
        helper = load_target(assistant, dtype=target.dtype, device=target.device)[0] if assistant else None
    tree = measured_tree(console, target, draft, calibrate)
    with progress_of(console) as progress:
        bars = {source: progress.add_task(source, total=None) for source in sources}
        rows, _ = compare_on(
            sources,
            target,
            tokenizer,
            draft,
            tree,
            assistant=helper,
            shapes=shapes,
            **settings,
            told=lambda source, done, total: progress.update(bars[source], completed=done, total=total),
        )
    for source in sources:
        console.print(comparison_table(source, [row for row in rows if row.prompts == source]))
    console.print(
        "x: seconds a token of target.generate over the contender's, prefill included, prompt by prompt. "
        "At least: the median's 95% lower bound by the sign test. Predicted: tokens a round by calibrated "
        "costs; decode: the same measured, prefill left out. Peak: memory held while it answered the longest "
        "prompt, weights included (on a CPU the whole process's).",
        style="dim",
        highlight=False,
    )
    if csv is not None:
        write_csv(rows, csv)
    if plot is not None:
        plot_comparison(rows, plot)


def comparison_table(source: str, rows: list[Row]) -> Table:
    """The rows of one set of prompts."""
    table = Table(
        "contender",
        "ms a token",
        "tokens a round",
        "x median (20%, 80%)",
        "at least",
        "predicted",
        "decode",
        "peak GB",
        title=f"{source}, {rows[0].answers} prompts",
    )
    for row in rows:
        peak = None if row.peak_bytes is None else row.peak_bytes / 1e9
        optional = [
            "" if value is None else f"{value:.2f}"
            for value in (row.tokens_per_round, row.bound, row.predicted, row.decode, peak)
        ]
        table.add_row(
            row.contender,
            f"{row.ms_per_token:.1f}",
            optional[0],
            f"{row.median:.2f} ({row.low:.2f}, {row.high:.2f})",
            *optional[1:],
        )
    return table
