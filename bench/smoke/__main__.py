"""A first look at a machine: every kernel once, rounds, answers and training.

Run it as `python -m bench.smoke [--device cpu] [NAME ...]`. Each check runs in a process of its own under a time limit,
so that one that crashes or hangs takes nothing with it. A line each as it ends, and last how many passed; the exit
status is how many did not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import IO, NamedTuple

import torch

from bench.processes import ROOT, watched
from bench.smoke import loops, ops
from bench.smoke.ops import BF16, FP32

COMMAND = [sys.executable, "-m", "bench.smoke"]
"""Runs one check, given its name and --here."""
SECONDS = 100.0
AT_ONCE = max(1, (os.cpu_count() or 1) - 4)
TAIL = 2000
DEVICES = ("cuda", "cpu")
CHECKS: dict[str, Callable[[str], str | None]] = {
    "limits": ops.limits,
    "kernels": ops.which_kernels,
    "block_attention:64:fp32": partial(ops.block_attention, width=64, heads=(9, 3), dtype=FP32),
    "block_attention:128:bf16": partial(ops.block_attention, width=128, heads=(8, 2), dtype=BF16),
    "training": loops.training,
    "rounds:whole": partial(loops.rounds, page_size=None),
    "rounds:paged": partial(loops.rounds, page_size=16),
    "answers": loops.answers,
    "block_attention:64:bf16": partial(ops.block_attention, width=64, heads=(9, 3), dtype=BF16),
    "block_attention:64:mha": partial(ops.block_attention, width=64, heads=(9, 9), dtype=BF16),
    "tree_attention:64:fp32": partial(ops.tree_attention, width=64, heads=(9, 3), dtype=FP32),
    "tree_attention:64:bf16": partial(ops.tree_attention, width=64, heads=(9, 3), dtype=BF16),
    "tree_attention:64:mha": partial(ops.tree_attention, width=64, heads=(9, 9), dtype=BF16),
    "tree_attention:128:bf16": partial(ops.tree_attention, width=128, heads=(32, 8), dtype=BF16),
    "extend_attention": ops.extend_attention,
    "distill_loss:bf16": partial(ops.distill_loss, dtype=BF16),
    "distill_loss:fp32": partial(ops.distill_loss, dtype=FP32),
    "adjust_logits": ops.adjust_logits,
    "choose_tokens": ops.choose_tokens,
    "trees": ops.trees,
    "lookup": ops.drafts_without_a_model,
    "verify_chain": ops.verify_chain,
    "compact_cache_": ops.compact_cache_,
    "skinny_linear": ops.skinny_linear,
    "int8_linear": ops.int8_linear,
    "decoder_layer": ops.decoder_layer,
}
"""By name, those that compile longest first."""
ONLY = {"limits": "cuda", "skinny_linear": "cpu", "int8_linear": "cpu", "decoder_layer": "cpu"}
"""The device of those that are for one alone."""


class Check(NamedTuple):
    """One under way; `output` is its stdout, `errors` its stderr."""

    name: str
    process: subprocess.Popen
    guard: ExitStack
    output: IO[str]
    errors: IO[str]
    began: float

    @classmethod
    def start(cls, name: str, device: str) -> Check:
        output, errors = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))
        process = subprocess.Popen(
            [*COMMAND, "--here", "--device", device, name],
            cwd=ROOT,
            stdout=output,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        )
        guard = ExitStack()
        guard.enter_context(watched(process))
        return cls(name, process, guard, output, errors, time.monotonic())

    def end(self) -> None:
        """Kill it with all that it started; Python first writes where it stands."""
        self.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.guard.close()

    def report(self, note: str = "") -> bool:
        """Print its line, and the end of what it wrote where it did not pass; whether it passed."""
        self.guard.close()
        passed = self.process.returncode == 0 and not note
        if not passed and not note and self.process.returncode < 0:
            note = f"ended by {signal.Signals(-self.process.returncode).name}"
        output, errors = (read(file) for file in (self.output, self.errors))
        before, dump, stack = errors.partition("Fatal Python error")  # a stack has its end first, and a list behind it
        errors = before[-TAIL:] + dump + stack.partition("\nExtension modules")[0][:TAIL]
        lines = [f"{'ok  ' if passed else 'FAIL'} {self.name}, {time.monotonic() - self.began:.0f} s", output[-TAIL:]]
        print("\n".join(filter(None, lines if passed else [*lines, errors, note])), flush=True)
        return passed


def read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read().rstrip()


def run(names: list[str], device: str, seconds: float, at_once: int) -> int:
    """All of them, so many at once; how many did not pass."""
    waiting, passed = list(names), 0
    running: list[Check] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Check.start(waiting.pop(0), device))
            time.sleep(0.05)
            for check in list(running):
                if check.process.poll() is not None:
                    passed += check.report()
                elif time.monotonic() - check.began > seconds:
                    check.end()
                    check.report(f"stopped after {seconds:g} s")
                else:
                    continue
                running.remove(check)
    finally:
        for check in running:
            check.end()
    print(f"{passed} of {len(names)} passed", flush=True)
    return len(names) - passed


def run_here(names: list[str], device: str) -> int:
    """One after the other in this process; the first that fails raises."""
    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        if found := CHECKS[name](device):
            print(f"     {found}")
        if device == "cuda":
            torch.cuda.synchronize()
    return 0


def names_for(device: str) -> list[str]:
    """The checks that a device takes."""
    return [name for name in CHECKS if ONLY.get(name, device) == device]


def main(arguments: list[str]) -> int:
    """The exit status: how many checks did not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless given: {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a check's limit (default {SECONDS:g})")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"checks that run at one time (here {AT_ONCE})")
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger: the first fault raises")
    options = parser.parse_intermixed_args(arguments)
    device, at_once = options.device, options.at_once
    found = [name for name in DEVICES if name != "cuda" or torch.cuda.is_available()]
    if device not in found:
        parser.error(f"device is {device!r}; allowed here: {', '.join(found)}")
    for name in options.names:
        if name not in names_for(device):
            parser.error(f"no check {name!r} on {device}; allowed: {', '.join(names_for(device))}")
    if at_once < 1 or options.seconds <= 0:
        parser.error(f"--at-once is {at_once}, --seconds {options.seconds:g}; allowed: at least 1, above 0")
    names = options.names or names_for(device)
    if options.here:
        return run_here(names, device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(names, device, options.seconds, at_once)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
