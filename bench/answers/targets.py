"""Every kind of causal LM that transformers has, made tiny: its tokens, or a refusal: python -m bench.answers.targets

A kind is right where `generate` gives the tokens of the model's own greedy `target.generate`, without and with a draft
and for a padded batch, or where it refuses the model with a reason before any token. Other tokens and other errors are
faults, and the exit status is then 1. A kind whose layers are not all full attention is tried once more with layers
that are. Each is tried in a process of its own, under a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, logging
from transformers.generation.streamers import BaseStreamer

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.draft import BeagleDraft
from bench.answers.tiny_targets import KINDS, full_attention, tiny_target
from bench.environment import commit, device_name, sources, versions
from bench.processes import ROOT

OUT = ROOT / "bench" / "results" / "targets.json"
SECONDS = 60.0
PROMPT, PADDING, NEW = 11, 4, 20
TREE = TreeShape(depth=3, branch=8, num_nodes=60)
AS_IT_COMES, FULL = "as it comes", "full attention"
SAME, REFUSED, NOT_MADE, OTHER, RAISED = "same", "refused", "not made", "other tokens", "raised"
FAULTS = (OTHER, RAISED)
VARIED = 8
"""Different tokens of a text that tells something."""


@dataclass
class Row:
    """What came of a kind; `layers` AS_IT_COMES or FULL; `why` is the reason given, or the error.

    varied: different tokens among the text's; tokens_per_round of the draft that knows the text's words; padded:
    whether a padded batch was compared.
    """

    kind: str
    layers: str
    outcome: str
    why: str = ""
    varied: int = 0
    tokens_per_round: float = 0.0
    padded: bool = False


class Told(BaseStreamer):
    """How many times tokens came, the prompt included."""

    def __init__(self) -> None:
        self.times = 0

    def put(self, value: Tensor) -> None:
        self.times += 1

    def end(self) -> None:
        pass


def own_text(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The new tokens [B, NEW] of the model's own greedy decoding."""
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, ids.shape[1] :]  # type: ignore


def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts and their mask [2, PROMPT]: the second padded on the left."""
    ids = torch.randint(3, 120, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return ids, mask


def varied_target(kind: str, overrides: dict[str, Any]) -> tuple[PreTrainedModel, Tensor]:
    """Of a few seeds' models the first whose text has VARIED different tokens, or the most, and that text [1, NEW]."""
    ids, mask = prompts()
    best: tuple[int, PreTrainedModel, Tensor] | None = None
    for seed in range(6):
        model = tiny_target(kind, seed, **overrides)
        text = own_text(model, ids[:1], mask[:1])
        varied = len(text.unique())
        if best is None or varied > best[0]:
            best = varied, model, text
        if varied >= VARIED:
            break
    assert best is not None
    return best[1:]


def padded_text(model: PreTrainedModel, ids: Tensor, mask: Tensor, alone: Tensor) -> Tensor | None:
    """The model's own text of the padded batch, None where it is not that of each row alone."""
    try:
        text = own_text(model, ids, mask)
        second = own_text(model, ids[1:, PADDING:], mask[1:, PADDING:])
    except Exception:
        return None
    return text if text.equal(torch.cat([alone, second])) else None


def tried(kind: str, layers: str, overrides: dict[str, Any], tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Make the kind, let it and `generate` write. `tell` is given what stands should a step end this process."""
    tell(Row(kind, layers, NOT_MADE))
    try:
        model, want = varied_target(kind, overrides)
    except Exception as error:
        return Row(kind, layers, NOT_MADE, said(error))
    tell(Row(kind, layers, RAISED))
    ids, mask = prompts()
    row = Row(kind, layers, SAME, varied=len(want.unique()))
    told = Told()
    try:
        row.tokens_per_round = compared(model, ids[:1], mask[:1], want, told)
        batch = padded_text(model, ids, mask, want)
        if batch is not None:
            row.padded = True
            compared(model, ids, mask, batch, None)
    except Differs as error:
        row.outcome, row.why = OTHER, str(error)
    except ValueError as error:
        clear = "allowed" in str(error) and not told.times
        row.outcome, row.why = (REFUSED, str(error)) if clear else (RAISED, said(error))
    except Exception as error:
        row.outcome, row.why = RAISED, said(error)
    return row


class Differs(Exception):
    """Tokens that are not the model's own."""


def compared(model: PreTrainedModel, ids: Tensor, mask: Tensor, want: Tensor, told: Told | None) -> float:
    """`generate` without a draft, with a fresh one, and with one that knows no words but the text's, whose trees are
    accepted often; the last one's tokens a round."""
    drafts = {
        "without a draft": lambda: None,
        "with a draft": lambda: BeagleDraft.from_target(model),
        "with a draft of the text's words": lambda: BeagleDraft.from_target(model, want.unique()),
    }
    per_round = 0.0
    for name, make in drafts.items():
        made = generate(model, make(), ids, mask, max_new_tokens=NEW, tree=TREE, streamer=told)
        found = made.sequences[:, ids.shape[1] :]
        if not found.equal(want):
            first = (found != want).nonzero()[0].tolist()
            raise Differs(f"{name}, {len(ids)} rows: row {first[0]} from new token {first[1]} on")
        per_round = made.report.tokens_per_round
    return round(per_round, 2)


def said(error: BaseException) -> str:
    """The error's kind and its text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def rows_of(kind: str, tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The kind as it comes and, where other layers can be made full attention, with that in all of them."""
    rows = [tried(kind, AS_IT_COMES, {}, tell)]
    tell(rows[0])
    if rows[0].outcome != NOT_MADE and (overrides := full_attention(kind)):
        row = tried(kind, FULL, overrides, tell)
        rows += [row] if row.outcome != NOT_MADE else []
    return rows


def work(kind: str, answer: Connection) -> None:
    """rows_of in a process of its own: what stands on the way, a Row each, then all of them."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # models and compilers print what they like
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer.send(rows_of(kind, answer.send))


@dataclass
class Running:
    """A kind that is being tried; `standing` is what it told, by its layers."""

    kind: str
    process: BaseProcess
    answer: Connection
    ends: float
    standing: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def start(cls, kind: str, seconds: float) -> Running:
        """A fork: transformers is imported once, for all."""
        context = multiprocessing.get_context("fork")
        answer, other = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(kind, other), daemon=True)
        process.start()
        other.close()
        return cls(kind, process, answer, time.monotonic() + seconds)

    def rows(self, seconds: float) -> list[Row] | None:
        """What it found; None while it is at work."""
        try:
            while self.answer.poll():
                if isinstance(message := self.answer.recv(), list):
                    return self.ended(message)
                self.standing[message.layers] = message
        except EOFError:
            self.process.join()
            return self.ended(self.cut_short(f"its process ended with {self.process.exitcode}"))
        if time.monotonic() > self.ends:
            return self.ended(self.cut_short(f"no end in {seconds:g} s"))
        return None

    def cut_short(self, why: str) -> list[Row]:
        """What stood last."""
        found = list(self.standing.values()) or [Row(self.kind, AS_IT_COMES, NOT_MADE)]
        found[-1].why = found[-1].why or why
        return [row for row in found if row.layers == AS_IT_COMES or row.outcome != NOT_MADE]

    def ended(self, found: list[Row]) -> list[Row]:
        self.process.kill()
        self.process.join()
        self.answer.close()
        return found


def sweep(kinds: list[str], seconds: float, at_once: int) -> list[Row]:
    """All of them, in the order of `kinds`, so many at once; a line for each row as it comes."""
    waiting = list(kinds)
    running: list[Running] = []
    found: dict[str, list[Row]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(Running.start(waiting.pop(0), seconds))
        wait([one.answer for one in running], timeout=0.5)
        for one in list(running):
            if (rows := one.rows(seconds)) is not None:
                running.remove(one)
                found[one.kind] = rows
                for row in rows:
                    print(f"{row.kind}, {row.layers}: {row.outcome} {row.why}".rstrip(), flush=True)
    return [row for kind in kinds for row in found[kind]]


def main(arguments: list[str]) -> int:
    """1 where a kind gave other tokens or raised what is no refusal."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="as transformers names them; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a kind's limit (default {SECONDS:g})")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="kinds tried at one time")
    parser.add_argument("--out", type=Path, help=f"write the rows as JSON; of all kinds {OUT.relative_to(ROOT)}")
    options = parser.parse_intermixed_args(arguments)
    if unknown := sorted(set(options.kinds) - set(KINDS)):
        parser.error(f"no kinds {', '.join(unknown)}; allowed: {', '.join(KINDS)}")
    logging.set_verbosity_error()
    rows = sweep(options.kinds or list(KINDS), options.seconds, options.at_once)
    out = options.out or (None if options.kinds else OUT)
    if out:
        where = {"commit": commit(), "sources": sources(), "device": device_name("cpu")}
        write_json(out, where | versions("torch", "transformers") | {"rows": [asdict(row) for row in rows]})
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in (SAME, REFUSED, NOT_MADE, *FAULTS)}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(any(row.outcome in FAULTS for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
