"""Every kind of causal LM that transformers has, made tiny: its tokens, or a refusal: python -m bench.answers.targets

A kind is right where `generate` gives the tokens of the model's own greedy `target.generate` and, sampled, those that
the model's own logits and the noise decide, without and with a draft and for a padded batch; or where it refuses the
model with a reason before any token. Other tokens and other errors are faults, and the exit status is then 1. A kind
whose layers are not all full attention is tried once more with layers that are, and one that takes images with an
image. Each is tried in a process of its own, under a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import logging

from beagle_sd.files import write_json
from bench.answers.kinds.one_kind import AS_IT_COMES, FAULTS, NOT_MADE, REFUSED, SAME, Row, rows_of
from bench.answers.kinds.tiny_targets import KINDS
from bench.environment import commit, device_name, sources, versions
from bench.processes import ROOT

OUT = ROOT / "bench" / "results" / "targets.json"
SECONDS = 60.0


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
