"""`beagle-sd` killed or interrupted at any moment and run again: nothing is lost, doubled or changed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from models import small_target
from tokenizers_for_tests import small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from beagle_sd.cli.app import app
from beagle_sd.cli.console import clear_errors
from beagle_sd.data import shards

ROOT = Path(__file__).resolve().parents[3]
COUNT = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    small_target().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


class Writer(shards.ShardWriter):
    """Small shards, written slowly enough to be interrupted at: each sequence costs two milliseconds.

    `kill` (index, seconds): a timer of processor time, whose signal ends a process as a kill does, is set when so many
    sequences have been added.
    """

    kill: tuple[int, float] | None = None

    def __init__(self, folder, manifest, **processes):
        super().__init__(folder, manifest, tokens_per_shard=60, **processes)
        self.added = 0
        self.set_timer()

    def set_timer(self):
        if self.kill is not None and self.kill[0] == self.added:
            signal.setitimer(signal.ITIMER_PROF, self.kill[1])

    def add(self, sequence):
        until = time.process_time() + 0.002
        while time.process_time() < until:
            pass
        super().add(sequence)
        self.added += 1
        self.set_timer()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "ShardWriter", Writer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Conversations of different lengths, with a blank line among them."""
    path = tmp_path_factory.mktemp("source") / "chats.jsonl"
    said = [
        [{"role": "user", "content": "abcdef"[: 1 + i % 6]}, {"role": "assistant", "content": "hello " * (1 + i % 4)}]
        for i in range(COUNT)
    ]
    lines = [json.dumps({"messages": turns}) + "\n" for turns in said]
    path.write_text("".join([*lines[:5], "\n", *lines[5:]]), encoding="utf-8")
    return path


def prepare(target, source, out, *more: str):
    arguments = ["prepare", str(source), str(out), "--target", str(target), "--dtype", "float32", *more]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


REGENERATE = ("--regenerate", "--batch", "4", "--max-new-tokens", "20")


def sequences_of(folder) -> dict[int, shards.Sequence]:
    found = list(shards.read_sequences(folder))
    by_index = {sequence.index: sequence for sequence in found}
    assert len(by_index) == len(found), "nothing twice"
    return by_index


@pytest.fixture(autouse=True)
def _ctrl_c_counts():
    """Whoever started the tests, in the background perhaps, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), REGENERATE], ids=["as they are", "regenerated"])
def test_killed_at_random_moments(target, source, more, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    loaded = model.eval(), AutoTokenizer.from_pretrained(target)
    monkeypatch.setattr("beagle_sd.cli.prepare.load_target", lambda *args, **options: loaded)
    assert prepare(target, source, tmp_path / "warm", *more).exit_code == 0
    before = time.process_time()
    assert prepare(target, source, tmp_path / "whole", *more).exit_code == 0
    eighth = (time.process_time() - before) / 8
    rng, out, unfinished, most = random.Random(0), tmp_path / "killed", 0, 12
    for _ in range(8):  # the first comes behind a shard or more, and long before the last sequence
        monkeypatch.setattr(Writer, "kill", (rng.randrange(most - 6, most), rng.uniform(0.0001, eighth)))
        assert forks.run(lambda: prepare(target, source, out, *more)) in (0, -signal.SIGPROF)
        unfinished += 0 < len(list(shards.read_sequences(out, with_states=False))) < COUNT
        most = 6
    monkeypatch.setattr(Writer, "kill", None)
    last = prepare(target, source, out, *more)
    assert last.exit_code == 0, last.output
    found, wanted = sequences_of(out), sequences_of(tmp_path / "whole")
    assert found.keys() == wanted.keys() and len(found) == COUNT
    assert not list(out.glob("*.partial.*"))
    assert (out / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()
    for index, sequence in found.items():
        with torch.no_grad():
            states = model.model(sequence.tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(sequence.states.float(), states, rtol=2e-2, atol=2e-2)
        same = wanted[index]
        assert sequence.temperature == same.temperature
        assert sequence.tokens.equal(same.tokens) and sequence.loss_mask.equal(same.loss_mask)
        assert sequence.final_token == same.final_token
    assert unfinished, "no kill came between the first shard and the last"


def test_interrupted_between_sequences(target, source, tmp_path, monkeypatch):
    """Ctrl-C, the real signal, while the fifth sequence is stored: it and those before are kept."""
    taken = []

    class Interrupting(Writer):
        def add(self, sequence):
            taken.append(sequence.index)
            if len(taken) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            super().add(sequence)

    monkeypatch.setattr(shards, "ShardWriter", Interrupting)
    stopped = prepare(target, source, tmp_path / "out")
    assert stopped.exit_code == 130 and "run the same command again to go on" in stopped.output, stopped.output
    assert sorted(sequences_of(tmp_path / "out")) == sorted(taken) and len(taken) == 5
    assert f"{COUNT - 5} of {COUNT} conversations" in prepare(target, source, tmp_path / "out").output
    assert len(sequences_of(tmp_path / "out")) == COUNT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_training_goes_on_where_it_was(target, source, tmp_path, monkeypatch):
    """Ctrl-C in a step: the step is finished and saved; the run that goes on ends as one undisturbed."""
    from beagle_sd.training.trainer import Trainer

    prepare(target, source, tmp_path / "states")
    options = [
        "--draft-vocab",
        "40",
        "--block-epochs",
        "2",
        "--simulation-epochs",
        "1",
        "--tokens-per-step",
        "128",
        "--lr",
        "1e-3",
        "--warmup-steps",
        "2",
        "--target",
        str(target),
    ]

    def train(out):
        return CliRunner().invoke(app, ["train", str(tmp_path / "states"), str(out), *options], env={"COLUMNS": "300"})

    assert train(tmp_path / "whole").exit_code == 0
    step, interrupted = Trainer.train_step, []

    def train_step(self):
        if self.step == 3 and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    stopped = train(tmp_path / "stopped")
    assert stopped.exit_code == 130 and "run the same command again to go on" in stopped.output, stopped.output
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert train(tmp_path / "stopped").exit_code == 0
    name = "final/model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_interrupt_is_immediate():
    from beagle_sd.cli.interrupt import deferred_interrupt

    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def starting(tmp_path):
    """Runs Python where the import of torch, or of transformers, is a Ctrl-C: (exit status, what stderr says)."""
    for name in ("torch.py", "transformers.py"):
        (tmp_path / name).write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsum(range(10**6))\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "python", ROOT)))

    def run(*arguments) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    return run


def test_interrupted_while_torch_is_imported(starting, tmp_path):
    """The commands end quietly, by the signal: 130 in a shell. A program that imports the package keeps its own way."""
    script = tmp_path / "beagle-sd"
    script.write_text("import sys\nfrom beagle_sd.cli.app import app\nsys.exit(app())\n")
    for arguments in (("-m", "beagle_sd", "info"), (script, "info")):
        assert starting(*arguments) == (-signal.SIGINT, ""), arguments
    assert "KeyboardInterrupt" in starting("-c", "import beagle_sd")[1]


def test_what_has_something_to_keep_hears_of_it():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a command starts
    with clear_errors():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
