"""Contenders' processes, and the turns in which they answer: one computes at a time, the others sleep."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.processes import ROOT, watched

LOAD_SECONDS = 300.0
ANSWER_SECONDS = 120.0
PAUSE = 0.15
"""Seconds after each answer, in which the threads of the one before stop to spin."""
T = TypeVar("T")


class Answer(NamedTuple):
    """New tokens with the end token, wall seconds with the prefill, and those after the first token if told."""

    tokens: list[int]
    seconds: float
    decode_seconds: float | None


class Gone(Exception):
    """A process that does not answer any more, and why."""


class Worker:
    """A process of `bench.engines.workers`, which `stack` ends; what it prints is in the file `log`.

    versions: of its packages. Gone from the constructor says why it cannot take part.
    """

    def __init__(self, stack: ExitStack, command: list[str], variables: Mapping[str, str], log: Path):
        self.log, self._idle_from, self.idle_cpu, self.idle_wall = log, (0.0, 0.0), 0.0, 0.0
        with log.open("wb") as file:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=dict(variables), start_new_session=True, bufsize=0, **pipes
            )
        stack.enter_context(watched(self._process))
        self.versions: dict[str, str] = self._read(LOAD_SECONDS)["ready"]

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Answer a prompt greedily; Gone if the process ends, says nothing or takes longer than
        ANSWER_SECONDS."""
        self._woken()
        request = json.dumps({"prompt": list(prompt), "max_new_tokens": new_tokens}) + "\n"
        try:
            self._process.stdin.write(request.encode())  # type: ignore[union-attr]
        except OSError:
            raise Gone(self._end()) from None
        answer = Answer(**self._read(ANSWER_SECONDS))
        if not answer.tokens:
            raise Gone("it answered with no token at all")
        time.sleep(PAUSE)
        self._idle_from = time.monotonic(), cpu_seconds(self._process.pid)
        return answer

    @property
    def idle_share(self) -> float | None:
        """Of a core, how much of it the process used while it was not asked; None if it was never idle."""
        return round(self.idle_cpu / self.idle_wall, 4) if self.idle_wall else None

    def _woken(self) -> None:
        since, before = self._idle_from
        if since:
            self.idle_wall += time.monotonic() - since
            self.idle_cpu += cpu_seconds(self._process.pid) - before

    def _read(self, seconds: float) -> dict:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            raise Gone(f"no answer in {seconds:.0f} s")
        line = out.readline()
        if not line.endswith(b"\n"):
            raise Gone(self._end())
        message = json.loads(line)
        if "why" in message:
            raise Gone(message["why"])
        return message

    def _end(self) -> str:
        said = self.log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with {self._process.wait()}" + (f": {said[-1][:300]}" if said else "")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads, 0 where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def turned(items: Sequence[T], number: int) -> list[T]:
    """The items in an order that turns by one from number to number."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def answers_to(
    workers: Mapping[str, Worker], prompts: Sequence[Sequence[int]], new_tokens: int, gone: dict[str, str]
) -> Iterator[dict[str, Answer]]:
    """Each prompt answered by every worker in turn; one that is Gone is noted in `gone` with the reason, and not asked
    again."""
    for number, prompt in enumerate(prompts):
        answers = {}
        for name in turned(list(workers), number):
            if name not in gone:
                try:
                    answers[name] = workers[name].answer(prompt, new_tokens)
                except Gone as error:
                    gone[name] = str(error)
        yield answers
