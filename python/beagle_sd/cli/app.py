"""The command `beagle-sd`: generate, chat, bench, prompts, prepare, train, serve, plot, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from beagle_kernels.__main__ import main as kernels_report
from beagle_sd.cli.bench import bench
from beagle_sd.cli.chat import chat
from beagle_sd.cli.console import clear_errors, console
from beagle_sd.cli.generate import generate
from beagle_sd.cli.prepare import prepare
from beagle_sd.cli.prompts import prompts
from beagle_sd.cli.serve import serve
from beagle_sd.cli.train import train
from beagle_sd.data.evaluation_sets import prompts_folder
from beagle_sd.decoding.trees.calibration import calibration_folder
from beagle_sd.evaluation.plot import plot_run
from beagle_sd.files import cache_folder
from beagle_sd.models.loading import bundled_names

app = typer.Typer(
    help="Lossless speculative decoding with a cross-attention draft (Beagle, arXiv 2505.24544).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (generate, chat, bench, prompts, prepare, train):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of `train`.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write; default: RUN/plot.png.")] = None,
) -> None:
    """Draw a run's loss and its acceptance by depth from its log."""
    with clear_errors():
        plot_run(run, out or run / "plot.png")
        console.print(f"{out or run / 'plot.png'}")


@app.command()
def info() -> None:
    """Versions, devices, backends of every op, bundled drafts, the cache folder and the costs kept there."""
    with clear_errors():
        kernels_report()
        kept = len(list(calibration_folder().glob("*.json")))
        console.print(
            f"\nbundled drafts: {', '.join(bundled_names()) or 'none'}\ncache folder: {cache_folder()}\n"
            f"calibrations: {kept} in {calibration_folder()}\n"
            f"prompts and evaluation sets: {prompts_folder()}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    app()
