"""The command `beagle-sd`: generate, bench, prompts, prepare, train, plot, info."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from beagle_sd.cli.interrupt import raise_at_interrupt

app = typer.Typer(
    help="Lossless speculative decoding with a cross-attention draft (Beagle, arXiv 2505.24544).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

Target = Annotated[str, typer.Option(help="Target model: smollm2-135m, a folder, or a hub name.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bf16 on a GPU, fp32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")]
Draft = Annotated[Path | None, typer.Option(help="Draft folder; default: the one bundled for the target.")]
Calibrate = Annotated[bool, typer.Option(help="Measure this machine's costs anew, instead of those kept.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling, of the data's order, or of the prompts.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    target: Target = "smollm2-135m",
    draft: Draft = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k best tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of this mass; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best; 0 is off.")] = 0.0,
    seed: Seed = 0,
    num_nodes: Annotated[int | None, typer.Option(help="Tree nodes a round; default: by cost and acceptance.")] = None,
    depth: Annotated[int | None, typer.Option(help="Levels of drafted tokens.")] = None,
    branch: Annotated[int | None, typer.Option(help="Branching; 1 is a chain.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text itself, without a chat template.")] = False,
    compare: Annotated[bool, typer.Option(help="Decode the same plainly afterwards, and compare.")] = True,
    calibrate: Calibrate = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Answer a prompt speculatively, tokens accepted from the draft in colour, then compare with plain decoding."""
    from beagle_sd.cli import session

    with _clear_errors():
        session.answer(
            console,
            prompt,
            target,
            draft,
            raw=raw,
            compare=compare,
            calibrate=calibrate,
            dtype=dtype,
            device=device,
            shape=(depth, branch, num_nodes),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )


@app.command("bench")
def compare_contenders(
    target: Target = "smollm2-135m",
    draft: Draft = None,
    prompts: Annotated[
        list[str],
        typer.Option(
            help="mt-bench, humaneval, gsm8k, a .jsonl of conversations or a .txt "
            "of one prompt a line; may be given again."
        ),
    ] = ["mt-bench"],  # noqa: B006
    count: Annotated[int, typer.Option(help="Prompts of each.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    assistant: Annotated[str | None, typer.Option(help="A smaller model for transformers' own speculation.")] = None,
    shape: Annotated[
        list[str],
        typer.Option(
            help="A tree to measure, as depth,branch,num_nodes; may be given again. "
            "Default: the best chain and tree by costs."
        ),
    ] = [],  # noqa: B006
    calibrate: Calibrate = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios there; needs matplotlib.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Time whole answers side by side: target.generate, transformers' speculation, Beagle's plain, chain and trees."""
    from beagle_sd.cli.bench import bench
    from beagle_sd.evaluation.comparison import read_shape

    with _clear_errors():
        bench(
            console,
            target,
            draft,
            prompts,
            count=count,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            assistant=assistant,
            shapes=[read_shape(text) for text in shape],
            calibrate=calibrate,
            csv=csv,
            plot=plot,
            dtype=dtype,
            device=device,
        )


@app.command()
def prompts(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(help="How many.")] = 12000,
    seed: Seed = 0,
) -> None:
    """Write training prompts from licence-clean sources, for `prepare --regenerate`."""
    from beagle_sd.cli.session import waiting
    from beagle_sd.data.prompts import build_prompts

    with _clear_errors():
        missing: list[str] = []
        with waiting(console, "gathering prompts"):
            made = build_prompts(count, seed, left_out=missing.append)
        for reason in missing:
            console.print(f"left out: {escape(reason)}", soft_wrap=True)
        lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in made]
        out.write_text("".join(lines), encoding="utf-8")
    console.print(f"{len(lines)} prompts in {out}")


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Conversations (.jsonl), plain text (.txt) or answers (.npz).")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; an unfinished one is gone on with.")],
    target: Target = "smollm2-135m",
    regenerate: Annotated[bool, typer.Option(help="Let the target write the answers to the prompts.")] = False,
    batch: Annotated[int, typer.Option(help="Answers written at a time.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 192,
    context: Annotated[int, typer.Option(help="Longest conversation, in tokens.")] = 2048,
    limit: Annotated[int, typer.Option(help="Only the first so many conversations; 0: all.")] = 0,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Run the target over conversations and store its states for training. Safe to kill and run again."""
    from beagle_sd.cli import session

    with _clear_errors(f"; what is finished is in {out}: run the same command again to go on"):
        session.prepare(
            console,
            source,
            out,
            target,
            regenerate=regenerate,
            batch=batch,
            context=context,
            max_new_tokens=max_new_tokens,
            seed=seed,
            dtype=dtype,
            device=device,
            limit=limit,
        )


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder from `prepare`, or a file it takes: states live, none stored.")],
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints; an unfinished run is gone on with.")],
    target: Target = "smollm2-135m",
    draft_vocab: Annotated[int, typer.Option(help="Most frequent tokens the draft may propose; 0: all.")] = 8192,
    key_value_heads: Annotated[int, typer.Option(help="The draft's; more carry more of a state. 0: the target's.")] = 0,
    window: Annotated[int, typer.Option(help="Window of stage 1, block attention.")] = 5,
    steps: Annotated[int, typer.Option(help="Simulated steps of stage 2.")] = 4,
    block_epochs: Annotated[float, typer.Option(help="Epochs of stage 1.")] = 10.0,
    simulation_epochs: Annotated[float, typer.Option(help="Epochs of stage 2.")] = 10.0,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens a step.")] = 32768,
    context: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 2048,
    lr: Annotated[float, typer.Option(help="Learning rate; the paper's is for 7B, small targets want 1e-3.")] = 3e-5,
    schedule: Annotated[str, typer.Option(help="constant, or cosine to a tenth.")] = "constant",
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 2000,
    regression: Annotated[float, typer.Option(help="Weight of the hidden-state regression.")] = 10.0,
    noise: Annotated[float, typer.Option(help="Standard deviation of noise on the target's states.")] = 0.0,
    append_states: Annotated[bool, typer.Option(help="Let nodes see their ancestors' draft states.")] = True,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bf16.")] = False,
    micro_batches: Annotated[int, typer.Option(help="Parts in which a process does its share of a step.")] = 1,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard, in OUT/tensorboard.")] = False,
    eval_steps: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train a draft in two stages: block attention, then one-pass simulation. Safe to kill and run again."""
    from beagle_sd.cli import session
    from beagle_sd.training.trainer import TrainingConfig

    with _clear_errors(f"; the last checkpoint is in {out}: run the same command again to go on"):
        config = TrainingConfig(
            window=window,
            steps=steps,
            block_epochs=block_epochs,
            simulation_epochs=simulation_epochs,
            tokens_per_step=tokens_per_step,
            context=context,
            lr=lr,
            schedule=schedule,
            warmup_steps=warmup_steps,
            regression=regression,
            noise=noise,
            autocast=autocast,
            eval_steps=eval_steps,
            save_steps=save_steps,
            seed=seed,
            micro_batches=micro_batches,
        )
        session.train(
            console,
            data,
            out,
            target,
            config,
            draft_vocab=draft_vocab,
            key_value_heads=key_value_heads,
            append_states=append_states,
            device=device,
            tensorboard=tensorboard,
        )


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of `train`.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write; default: RUN/plot.png.")] = None,
) -> None:
    """Draw a run's loss and its acceptance by depth from its log."""
    from beagle_sd.evaluation.plot import plot_run

    with _clear_errors():
        plot_run(run, out or run / "plot.png")
        console.print(f"{out or run / 'plot.png'}")


@app.command()
def info() -> None:
    """Versions, devices, backends of every op, bundled drafts, the cache folders and the costs kept there."""
    from beagle_kernels.__main__ import main
    from beagle_sd.data.evaluation_sets import cache_folder as prompts_folder
    from beagle_sd.decoding.calibration import calibration_folder
    from beagle_sd.models.loading import bundled_names
    from beagle_sd.models.smollm2 import cache_folder

    main()
    kept = len(list(calibration_folder().glob("*.json")))
    console.print(
        f"\nbundled drafts: {', '.join(bundled_names()) or 'none'}\ncache folder: {cache_folder()}\n"
        f"calibrations: {kept} in {calibration_folder()}\n"
        f"prompts and evaluation sets: {prompts_folder()}",
        soft_wrap=True,
    )


class _clear_errors:
    """Show what a user can mend as one line, and exit with 1, or with 130 after Ctrl-C; anything else is a bug and
    keeps its traceback. transformers' own progress bars stay off."""

    def __init__(self, after_interrupt: str = ""):
        self.after_interrupt = after_interrupt

    def __enter__(self):
        from transformers.utils import logging

        logging.disable_progress_bar()
        raise_at_interrupt()
        return self

    def __exit__(self, kind, error, trace):
        from beagle_sd.training.trainer import TrainingStopped

        if isinstance(error, KeyboardInterrupt):
            console.print(f"\nstopped{escape(self.after_interrupt)}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from error
        if isinstance(error, (ValueError, OSError, TrainingStopped)) and not isinstance(error, BrokenPipeError):
            console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
