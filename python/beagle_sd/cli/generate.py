"""`beagle-sd generate`: one prompt, answered speculatively, then as it would be without."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from beagle_sd.cli.console import (
    Calibrate,
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
    waiting,
)
from beagle_sd.data.chats import encode_chat
from beagle_sd.decoding.generate import generate as decode
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.loading import bundled_folder, load_draft, load_target


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    target: TargetName = "smollm2-135m",
    draft: DraftFolder = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    tree: Tree = None,
    raw: Annotated[bool, typer.Option(help="Continue the text itself, without a chat template.")] = False,
    compare: Annotated[bool, typer.Option(help="Answer again by plain decoding and by target.generate.")] = True,
    calibrate: Calibrate = False,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = None,
) -> None:
    """Answer a prompt speculatively, tokens accepted from the draft in colour, then without the draft, all timed."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    with clear_errors():
        if not prompt.strip():
            raise ValueError("the prompt is empty; allowed: a word or more")
        prompt = as_text(prompt)
        shape = None if tree is None else TreeShape.parse(tree)
        if shape is not None and calibrate:
            raise ValueError("--calibrate was given with --tree; allowed: one or the other")
        folder = Path(draft) if draft else bundled_folder(target)
        with loading(console, target):
            model, tokenizer = load_target(target, dtype=dtype_of(dtype), device=device, weights=weights)
            loaded = load_draft(folder, model, weights=weights)
        ids = torch.tensor([_encoded(tokenizer, prompt, raw)])
        chosen = shape or _adaptive(model, loaded, calibrate)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
        with waiting(console, "warming up"):
            decode(model, loaded, ids, **{**options, "max_new_tokens": 4}, tree=chosen)
        found = decode(model, loaded, ids, streamer=RunStreamer(console, tokenizer), tree=chosen, **options)
        answers = {"speculative": Answer.of(found.report)}
        if compare:
            with waiting(console, "decoding the same without the draft"):
                plain = decode(model, None, ids, **options)
                answers["plain, same loop"] = Answer.of(plain.report)
                answers[TARGET_GENERATE] = target_generate(model, ids, max_new_tokens, seed, sampling)
        console.print(table(answers))
        console.print(footnote(found.report, shape), style="dim", highlight=False)
        if compare:
            same = torch.equal(found.sequences, plain.sequences)
            equal = "Same tokens as plain decoding."
            console.print(equal if same else first_difference(found.sequences, plain.sequences, ids.shape[1]))


def as_text(argument: str) -> str:
    """What a user gave as the UTF-8 text that it is where the terminal's encoding, as in LANG=C, does not say so."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError as error:
            raise ValueError(f"the prompt is no text in UTF-8 ({error}); allowed: UTF-8") from error


def _encoded(tokenizer, prompt: str, raw: bool) -> list[int]:
    if raw:
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def _adaptive(target, draft, calibrate: bool) -> AdaptiveTree:
    """The tree that adapts by measured costs and the draft's measured acceptance; says what it expects."""
    tree = measured_tree(target, draft, calibrate)
    best, gain = tree.best
    starts = "so it drafts" if tree.pays else "so it decodes plainly, with a try now and then"
    console.print(
        f"[dim]Expected: {gain:.2f}x plain decoding with the best tree ({best.num_nodes} nodes, depth "
        f"{best.depth}, branch {best.branch}), by this machine's costs and the draft's usual acceptance; "
        f"{starts}, until this text says otherwise.[/]",
        highlight=False,
    )
    return tree


class RunStreamer(BaseStreamer):
    """Prints each round's run: what the draft proposed and the target accepted in green, the target's own plain."""

    def __init__(self, console: Console, tokenizer):
        self.console, self.tokenizer = console, tokenizer
        self.ids: list[int] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        run = value.flatten().tolist()
        for accepted in [True] * (len(run) - 1) + [False]:
            self.ids.append(run.pop(0))
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            new = Text(text[self.shown :], style="bold green" if accepted else "")
            self.console.print(new, end="", soft_wrap=True)
            self.shown = len(text)

    def end(self) -> None:
        self.console.print()


TARGET_GENERATE = "target.generate"


@dataclass
class Answer:
    """New tokens, the seconds they took, prefill included, and what the loop reports if it is ours."""

    tokens: int
    seconds: float
    report: Report | None = None

    @classmethod
    def of(cls, report: Report) -> Answer:
        return cls(report.new_tokens, sum(report.seconds.values()), report)


def target_generate(
    target: PreTrainedModel, ids: Tensor, max_new_tokens: int, seed: int, sampling: Mapping[str, float]
) -> Answer:
    """What transformers does with the same settings, warmed up by a few tokens; sampled texts are its own."""
    options: dict[str, Any] = {"do_sample": False}
    if sampling["temperature"] > 0:
        options = {"do_sample": True, **sampling}
    ids = ids.to(target.device)
    call: Any = target.generate
    for new in (4, max_new_tokens):
        torch.manual_seed(seed)
        began = time.perf_counter()
        made = call(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
        count = int(made.shape[1]) - ids.shape[1]  # waits for the device
        seconds = time.perf_counter() - began
    return Answer(count, seconds)


def table(answers: Mapping[str, Answer]) -> Table:
    """A row an answer; speedup is tokens a second over target.generate's, if it is there. Fits 80 columns."""
    baseline = answers.get(TARGET_GENERATE)
    result = Table("", "tokens", "seconds", "tokens/s", "tokens a round", *(["speedup"] if baseline else []))
    for name, answer in answers.items():
        speed = answer.tokens / max(answer.seconds, 1e-9)
        rounds = "" if answer.report is None else f"{answer.report.tokens_per_round:.2f}"
        row = [name, str(answer.tokens), f"{answer.seconds:.2f}", f"{speed:.1f}", rounds]
        if baseline:
            row.append(f"{speed * baseline.seconds / max(baseline.tokens, 1):.2f}x")
        result.add_row(*row)
    return result


def footnote(report: Report, shape: TreeShape | None) -> str:
    """What the table does not say; shape None: the tree adapted."""
    by_depth = " ".join(f"{share:.2f}" for share in report.acceptance_by_depth)
    return (
        f"Prefill included. Tree: {shape or 'adaptive'}; drafted tokens accepted, by depth: {by_depth or 'none'}. "
        "One text says little: beagle-sd bench compares on many."
    )


def first_difference(found: Tensor, plain: Tensor, prompt: int) -> str:
    """Where two sequences [1, T], whose first `prompt` tokens are the prompt, part, in words."""
    length = min(found.shape[1], plain.shape[1])
    differs = (found[0, :length] != plain[0, :length]).nonzero()
    first = int(differs[0]) - prompt if len(differs) else length - prompt
    return (
        f"Differs from plain decoding from token {first} on: two logits lay within this dtype's rounding "
        "(fp32 is exact in practice)."
    )
