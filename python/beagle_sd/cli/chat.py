"""`beagle-sd chat`: turn after turn in a terminal or from a pipe, over one engine that keeps what was said."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.cli.console import (
    Device,
    DraftFolder,
    Dtype,
    MinP,
    Seed,
    TargetName,
    Temperature,
    TopK,
    TopP,
    Tree,
    Weights,
    clear_errors,
    console,
    dtype_of,
    loading,
    measured_tree,
    print_error,
    waiting,
)
from beagle_sd.cli.generate import RunStreamer, as_text
from beagle_sd.cli.interrupt import deferred_interrupt
from beagle_sd.data.answers import longest_text
from beagle_sd.data.dialogue import Dialogue
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import generate as decode
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import bundled_folder, load_draft, load_target

_CONTEXT = 4096
_HELP = """\
/reset        forget what was said; the text of the system stays
/system TEXT  begin anew with another text of the system; without TEXT with none
/report       what the last answer and the whole chat took
/help         this list
/exit         end, as the end of input does (Ctrl-D)
Ctrl-C stops an answer, and at the prompt the chat."""
_BEGIN_ANEW = "/reset forgets what was said, a larger --context gives more room"


def chat(
    target: TargetName = "smollm2-135m",
    draft: DraftFolder = None,
    system: Annotated[str, typer.Option(help="What the system tells the target before all else.")] = "",
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of the whole chat.", show_default=f"{_CONTEXT}, or the target's positions"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop an answer after this many tokens.")] = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    tree: Tree = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = None,
) -> None:
    """Talk with a target, a turn a line, its answers decoded speculatively, tokens accepted from the draft in colour.

    /help lists the commands. Lines may come from a pipe, too.
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    with clear_errors():
        shape = None if tree is None else TreeShape.parse(tree)
        folder = Path(draft) if draft else bundled_folder(target)
        with loading(console, target):
            model, tokenizer = load_target(target, dtype=dtype_of(dtype), device=device, weights=weights)
            loaded = load_draft(folder, model, weights=weights)
        dialogue = Dialogue(tokenizer, end_tokens(model, tokenizer), as_text(system))
        room = _context(model, context)
        chosen = shape or measured_tree(model, loaded, calibrate=False)
        session = Session(model, loaded, dialogue, room, chosen, max_new_tokens, options)
        session.warm_up()
        if _in_terminal():
            console.print("/help lists the commands", style="dim", highlight=False)
        for line in _lines():
            try:
                if not session.take(as_text(line.strip())):
                    break
            except ValueError as error:  # of this line: the next may be better
                print_error(error)


def _context(model: PreTrainedModel, asked: int | None) -> int:
    if asked is None:
        return longest_text(model, _CONTEXT)
    longest = longest_text(model, max(asked, 1 << 20))
    if not 2 <= asked <= longest:
        raise ValueError(f"context is {asked}; allowed: 2 to {longest}, what the target has positions for")
    return asked


def _in_terminal() -> bool:
    return sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """What the user types, line by line; where it comes from a pipe it is shown, so that the answers have questions."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as_text says what is wrong with a line
    if not _in_terminal():
        for line in sys.stdin:
            console.print(f"> {line.strip()}", style="bold", markup=False, highlight=False, soft_wrap=True)
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() the keys of an editor
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return


class Session:
    """A chat with a target, all of it in the buffers of one engine: `context` tokens at most, an answer of at most
    `max_new_tokens`; options: how generate samples."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: BeagleDraft,
        dialogue: Dialogue,
        context: int,
        tree: TreeShape | AdaptiveTree,
        max_new_tokens: int,
        options: dict[str, Any],
    ):
        self.model, self.draft, self.dialogue, self.context, self.tree = model, draft, dialogue, context, tree
        self.max_new_tokens = max_new_tokens
        self.options = {**options, "eos_token_id": sorted(dialogue.ends)}
        self.engine = Engine(self.model, self.draft, batch=1, capacity=self.context, tree=self.tree)
        self.tally = Tally()

    def warm_up(self) -> None:
        """A few tokens that nobody sees: the first answer is as fast as the next, and wrong options are named now."""
        with waiting(console, "warming up"):
            self._decode(self.dialogue.prompt("a").ids, min(self.max_new_tokens, 4))

    def take(self, line: str) -> bool:
        """Do what a line says, whether it is a command or a turn; False: end. ValueError where it cannot be done."""
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return False
        if command == "/reset":
            self.dialogue.forget()
            self.tally = Tally()
        elif command == "/system":
            self.dialogue.set_system(rest.strip())
            self.tally = Tally()
        elif command == "/report":
            for said in self.tally.lines():
                console.print(said, highlight=False, soft_wrap=True)
            console.print(f"context: {len(self.dialogue.ids)} of {self.context} tokens", highlight=False)
        elif command == "/help":
            console.print(_HELP, markup=False, highlight=False)
        elif command.startswith("/"):
            raise ValueError(f"the command is {command!r}; allowed: /reset, /system TEXT, /report, /help, /exit")
        elif line:
            self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Answer the user's next turn as it is shown. Ctrl-C takes effect behind a round, and what was said by then
        stays; a second one at once, wherever the engine is: another takes its place."""
        prompt = self.dialogue.prompt(text)
        report = None
        with deferred_interrupt(quiet=True) as check_interrupt:
            streamer = _Stoppable(self.dialogue.tokenizer, check_interrupt)
            try:
                report = self._decode(prompt.ids, self.max_new_tokens, streamer)
            except KeyboardInterrupt:
                pass  # of a round that was broken off the engine keeps nothing
        self.dialogue.add(prompt, streamer.ids)
        self.tally.add(len(prompt.ids), report)
        self._explain_end(streamer.ids, stopped=report is None)

    def _explain_end(self, answer: list[int], stopped: bool) -> None:
        """Why an answer ends where the target did not end it."""
        if not answer:
            said = "stopped before the answer: this turn is not kept"
        elif stopped:
            said = "stopped: the chat goes on from here"
        elif answer[-1] in self.dialogue.ends:
            return
        elif len(self.dialogue.ids) == self.context:
            said = f"the context of {self.context} tokens is full: {_BEGIN_ANEW}"
        else:
            said = f"cut after {len(answer)} tokens: --max-new-tokens says how many an answer may have"
        console.print(said, style="dim", highlight=False)

    def _decode(self, prompt: list[int], longest: int, streamer: RunStreamer | None = None) -> Report:
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"with this turn the chat has {len(prompt)} tokens and context is {self.context}; allowed: fewer than "
                f"the context, so that an answer fits: {_BEGIN_ANEW}"
            )
        options = {**self.options, "max_new_tokens": min(longest, room), "streamer": streamer}
        return decode(self.model, self.draft, torch.tensor([prompt]), engine=self.engine, **options).report


class _Stoppable(RunStreamer):
    """Raises KeyboardInterrupt behind the round in which it came, where the engine still holds the text."""

    def __init__(self, tokenizer, check_interrupt: Callable[..., None]):
        super().__init__(console, tokenizer)
        self.check_interrupt = check_interrupt

    def put(self, value: Tensor) -> None:
        super().put(value)
        self.check_interrupt()


class Tally:
    """What the answers of a chat took; `last` is None where the last one was stopped."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.last: Report | None = None
        self.prompt = 0

    def add(self, prompt: int, report: Report | None) -> None:
        """An answer to a prompt of so many tokens; without a report it was stopped."""
        self.last, self.prompt = report, prompt
        if report is not None:
            self.reports.append(report)

    def lines(self) -> list[str]:
        if not self.prompt:
            return ["nothing was answered yet"]
        return [*self._last(), self._all()]

    def _last(self) -> list[str]:
        if self.last is None:
            return ["the last answer was stopped, and is not counted"]
        report = self.last
        by_depth = " ".join(f"{share:.2f}" for share in report.acceptance_by_depth)
        return [
            f"last answer: {report.new_tokens} tokens in {sum(report.seconds.values()):.2f} s, "
            f"{report.tokens_per_second:.1f} tokens/s, prefill included",
            f"prefill: {report.seconds['prefill']:.3f} s, {report.prefilled} of {self.prompt} prompt tokens",
            f"rounds: {report.rounds}, {report.tokens_per_round:.2f} tokens a round",
            f"drafted tokens accepted, by depth: {by_depth or 'none'}",
        ]

    def _all(self) -> str:
        tokens = sum(report.new_tokens for report in self.reports)
        seconds = sum(sum(report.seconds.values()) for report in self.reports)
        rounds = sum(report.row_rounds for report in self.reports)
        in_rounds = sum(report.tokens_per_round * report.row_rounds for report in self.reports)
        return (
            f"the chat: {len(self.reports)} answers, {tokens} tokens in {seconds:.2f} s, "
            f"{tokens / max(seconds, 1e-9):.1f} tokens/s, {in_rounds / max(rounds, 1):.2f} tokens a round"
        )
