"""What the commands do: load, run, show."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data import conversations, shards
from beagle_sd.data.answers import encode_chat, requests_of, write_answers
from beagle_sd.data.dataset import PackedDataset, StateDataset, most_frequent
from beagle_sd.data.live import Corpus, LiveDataset
from beagle_sd.decoding.adaptive import AdaptiveTree, adaptive_tree
from beagle_sd.decoding.generate import Generated, TreeShape
from beagle_sd.decoding.generate import generate as decode
from beagle_sd.models import smollm2
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import bundled_folder, load_draft, load_target
from beagle_sd.training.parallel import own, same_everywhere, summed
from beagle_sd.training.start import passing_start_on
from beagle_sd.training.trainer import Trainer, TrainingConfig

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RunStreamer(BaseStreamer):
    """Prints each round's run: what the draft proposed and the target accepted in green, the target's own plain."""

    def __init__(self, console: Console, tokenizer):
        self.console, self.tokenizer = console, tokenizer
        self.ids: list[int] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        run = value.flatten().tolist()
        for accepted in [True] * (len(run) - 1) + [False]:
            self.ids.append(run.pop(0))
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            self.console.print(Text(text[self.shown :], style="bold green" if accepted else ""), end="", soft_wrap=True)
            self.shown = len(text)

    def end(self) -> None:
        self.console.print()


def answer(
    console: Console,
    prompt: str,
    target_name: str,
    draft_folder: Path | None,
    *,
    raw: bool,
    compare: bool,
    calibrate: bool,
    dtype: str,
    device: str | None,
    shape: tuple[int | None, int | None, int | None],
    **settings,
) -> None:
    """Decode speculatively while showing it, then plainly, and print both times."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; allowed: a word or more")
    folder = Path(draft_folder) if draft_folder else bundled_folder(target_name)
    with loading(console, target_name):
        target, tokenizer = load_target(target_name, dtype=dtype_of(dtype), device=device)
        draft = load_draft(folder, target)
    ids = (
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if raw
        else encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    )
    tree = _tree(console, target, draft, shape, calibrate)
    input_ids = torch.tensor([ids])
    options = {**settings, **({"adaptive": tree} if isinstance(tree, AdaptiveTree) else vars(tree))}
    with waiting(console, "warming up"):
        decode(target, draft, input_ids, **{**options, "max_new_tokens": 4})
    found = decode(target, draft, input_ids, streamer=RunStreamer(console, tokenizer), **options)
    with waiting(console, "decoding the same plainly"):
        plain = decode(target, None, input_ids, **settings) if compare else None
    console.print(_table(found, plain, tree))
    if plain is not None:
        same = torch.equal(found.sequences, plain.sequences)
        console.print("Same tokens as plain decoding." if same else _first_difference(found, plain, len(ids)))


def _tree(console: Console, target, draft, shape, calibrate: bool) -> TreeShape | AdaptiveTree:
    """The shape asked for, or what adapts by measured costs and the draft's measured acceptance."""
    if any(part is not None for part in shape):
        if calibrate:
            raise ValueError("--calibrate was given with a tree's shape; allowed: one or the other")
        return TreeShape.default(target.device, *shape)
    tree = measured_tree(console, target, draft, calibrate)
    best, gain = tree.best
    starts = "so it drafts" if tree.pays else "so it decodes plainly, with a try now and then"
    console.print(
        f"[dim]Expected: {gain:.2f}x plain decoding with the best tree ({best.num_nodes} nodes, depth "
        f"{best.depth}, branch {best.branch}), by this machine's costs and the draft's usual acceptance; "
        f"{starts}, until this text says otherwise.[/]",
        highlight=False,
    )
    return tree


def measured_tree(console: Console, target, draft, calibrate: bool) -> AdaptiveTree:
    """What adapts by this machine's costs, measured now if they are not known."""
    with waiting(console, "measuring what rounds cost on this machine: some seconds, the first time"):
        return adaptive_tree(target, draft, calibrate=calibrate)


def _table(found: Generated, plain: Generated | None, tree: TreeShape | AdaptiveTree) -> Table:
    table = Table("", "tokens", "seconds", "tokens/s", "tokens a round", "accepted, by depth")
    for name, result in (("speculative", found), ("plain", plain)):
        if result is None:
            continue
        report = result.report
        by_depth = " ".join(f"{share:.2f}" for share in report.acceptance_by_depth)
        kind = "adaptive" if isinstance(tree, AdaptiveTree) else f"{tree.num_nodes} nodes"
        label = f"{name}, {kind}" if result is found else name
        table.add_row(
            label,
            str(report.new_tokens),
            f"{sum(report.seconds.values()):.2f}",
            f"{report.tokens_per_second:.1f}",
            f"{report.tokens_per_round:.2f}",
            by_depth,
        )
    if plain is not None:
        ratio = sum(plain.report.seconds.values()) / sum(found.report.seconds.values())
        table.caption = f"{ratio:.2f}x plain decoding ({'faster' if ratio > 1 else 'slower'}), prefill included"
    return table


def _first_difference(found: Generated, plain: Generated, prompt: int) -> str:
    length = min(found.sequences.shape[1], plain.sequences.shape[1])
    differs = (found.sequences[0, :length] != plain.sequences[0, :length]).nonzero()
    place = int(differs[0]) - prompt if len(differs) else length - prompt
    return (
        f"Differs from plain decoding from token {place} on: two logits lay within this dtype's rounding "
        "(fp32 is exact in practice)."
    )


def prepare(
    console: Console,
    source: Path,
    out: Path,
    target_name: str,
    *,
    regenerate: bool,
    batch: int,
    max_new_tokens: int,
    context: int,
    seed: int,
    dtype: str,
    device: str | None,
    limit: int = 0,
) -> None:
    """Store states for training: of conversations as they are, or of answers that the target writes; this process's
    share of them under `torchrun` or `accelerate launch`."""
    if limit < 0:
        raise ValueError(f"limit is {limit}; allowed: 0 (all conversations) or more")
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("context", context)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file; allowed: .jsonl, .txt or .npz")
    if regenerate and source.suffix != ".jsonl":
        raise ValueError(
            f"{source} ends in {source.suffix!r}; allowed with --regenerate: .jsonl, whose last user turn "
            "the target answers"
        )
    processes, console = _joined(console, device)
    with processes.main_process_first(), loading(console, target_name):
        target, tokenizer = load_target(target_name, dtype=dtype_of(dtype), device=device or processes.device)
    manifest = _manifest(target, target_name, source, regenerate, max_new_tokens, context)
    with processes.main_process_first():
        writer = shards.ShardWriter(out, manifest, process=processes.process_index, processes=processes.num_processes)
    done = {sequence.index for sequence in shards.read_sequences(out, with_states=False)}
    sequences: Iterator[shards.Sequence]
    if regenerate:
        messages = list(islice(conversations.read_prompts(source), limit or None))
        asked = [(index, turns) for index, turns in messages if index not in done]
        total, mine = len(asked), own(asked)
        encoded = ((index, encode_chat(tokenizer, turns)) for index, turns in mine)
        sequences = write_answers(
            target,
            requests_of(encoded),
            end=tokenizer.eos_token_id,
            batch=batch,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    else:
        said = [
            item
            for item in islice(conversations.read_conversations(source, tokenizer, context), limit or None)
            if item.index not in done
        ]
        total, mine = len(said), own(said)
        sequences = conversations.states_of(target, mine)
    processes.wait_for_everyone()  # none writes before all know what is done
    counts = torch.tensor(_written(console, sequences, writer, len(mine)), device=target.device)
    written, tokens = summed(counts).tolist()
    notes = [f"{len(done)} were there before"] if done else []
    notes += [f"{total - written} are too short or too long"] if written < total else []
    console.print("; ".join([f"{written} of {total + len(done)} conversations, {tokens} tokens, now in {out}", *notes]))
    if not written and not done:
        raise ValueError(
            f"{source} holds nothing to learn from: "
            + (f"all {total} conversations are too short or too long" if total else "it is empty")
        )
    if regenerate and processes.is_main_process:
        conversations.export_answers(out, out / "answers.npz", conversations.read_sources(source))
        console.print(f"the answers' token ids alone: {out / 'answers.npz'}")


def _joined(console: Console, device: str | None) -> tuple[PartialState, Console]:
    """The processes of `torchrun` or `accelerate launch`, this one alone without; a quiet console for all but one."""
    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return processes, console if processes.is_main_process else Console(quiet=True)


def _written(
    console: Console, sequences: Iterator[shards.Sequence], writer: shards.ShardWriter, total: int
) -> tuple[int, int]:
    """Write the sequences as they come, with a progress bar: how many, and their tokens. Ctrl-C keeps what is done."""
    written, tokens, began = 0, 0, time.perf_counter()
    try:
        with progress_of(console) as progress, deferred_interrupt() as check_interrupt:
            bar = progress.add_task("prepare", total=total)
            for sequence in sequences:
                writer.add(sequence)
                written, tokens = written + 1, tokens + len(sequence.tokens)
                progress.update(bar, advance=1, description=f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
                check_interrupt()
    finally:
        writer.flush()
    return written, tokens


def train(
    console: Console,
    data: Path,
    out: Path,
    target_name: str,
    config: TrainingConfig,
    *,
    draft_vocab: int,
    key_value_heads: int,
    append_states: bool,
    device: str | None,
    tensorboard: bool,
) -> None:
    """Train a draft on a folder of shards, or on a file whose states the target computes live, with a progress bar,
    evaluation and checkpoints; this process's share of it under `torchrun` or `accelerate launch`. key_value_heads: 0
    for as many as the target's."""
    processes, console = _joined(console, device)
    with processes.main_process_first(), loading(console, target_name):
        target, tokenizer = load_target(target_name, device=device or processes.device)
    dataset: PackedDataset
    if data.is_file():
        corpus = Corpus.of(conversations.read_conversations(data, tokenizer, config.context))
        dataset = LiveDataset(target, corpus, context=config.context, held_out=config.held_out)
        ids = corpus.frequent_tokens(draft_vocab, target.config.vocab_size) if draft_vocab else None
    else:
        shards.check_manifest(data, hidden_size=target.config.hidden_size, vocab_size=target.config.vocab_size)
        dataset = StateDataset(data, context=config.context, held_out=config.held_out)
        ids = frequent_tokens(data, draft_vocab, target.config.vocab_size) if draft_vocab else None
    torch.manual_seed(config.seed)
    heads = {"num_key_value_heads": key_value_heads} if key_value_heads else {}
    draft = BeagleDraft.from_target(target, ids, append_states=append_states, **heads)
    trainer = Trainer(draft, dataset, out, config, tensorboard=tensorboard)
    if trainer.step == 0:
        same_everywhere(passing_start_on(draft, dataset, config.seed).parameters())
    console.print(
        f"{len(dataset.train)} sequences, {dataset.tokens_of(dataset.train)} tokens; {trainer.block_steps} "
        f"steps of stage 1, {trainer.total_steps - trainer.block_steps} of stage 2; at step {trainer.step}"
    )
    alone = processes.num_processes == 1  # others would not hear of a Ctrl-C at the same step
    interruptible = deferred_interrupt() if alone else nullcontext(lambda first: None)
    with progress_of(console) as progress, interruptible as check_interrupt:
        bar = progress.add_task("train", total=trainer.total_steps, completed=trainer.step)

        def show(step: int, metrics: dict) -> None:
            progress.update(bar, completed=step, description=f"stage {metrics['stage']} loss {metrics['loss']:.3f}")
            if "acceptance_by_depth" in metrics:
                console.print(f"step {step}: acceptance by depth {metrics['acceptance_by_depth']}")
            check_interrupt(trainer.save)

        trainer.run(show)
    console.print(f"the draft is in {out / 'final'}")


def frequent_tokens(data: Path, count: int, vocab_size: int) -> torch.Tensor:
    """The `count` most frequent assistant tokens of a shard folder, ascending; ties and the rest by lowest id."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sequence in shards.read_sequences(data, with_states=False):
        following = torch.cat([sequence.tokens[1:], torch.tensor([sequence.final_token])])
        counts += torch.bincount(following[sequence.loss_mask & (following >= 0)], minlength=vocab_size)
    return most_frequent(counts, count)


def _manifest(target, name: str, source: Path, regenerate: bool, max_new_tokens: int, context: int) -> dict:
    import hashlib

    return {
        "target": name,
        "model_type": target.config.model_type,
        "hidden_size": target.config.hidden_size,
        "vocab_size": target.config.vocab_size,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "regenerate": regenerate,
        "max_new_tokens": max_new_tokens if regenerate else None,
        "context": None if regenerate else context,
    }


def loading(console: Console, target_name: str) -> AbstractContextManager:
    """`waiting` for a target, by name."""
    if target_name == smollm2.NAME and not smollm2.is_converted(smollm2.converted_folder()):
        return waiting(console, f"converting {target_name} for transformers: once, about 15 seconds")
    return waiting(console, f"loading {target_name}")


def waiting(console: Console, what: str) -> AbstractContextManager:
    """Say on stderr what is waited for, until it is there; nothing where stderr is no terminal."""
    return Console(stderr=True, quiet=console.quiet).status(escape(what))


def progress_of(console: Console) -> Progress:
    """A bar with what is said beside it."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that --dtype names; None for auto."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]
