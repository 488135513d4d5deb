"""bench.smoke: its checks find an op that is wrong, and whatever a check does, the script says it and goes on."""

from __future__ import annotations

import functools
import itertools
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_processes import ROOT, WORK, left_of

import beagle_kernels as bk
from bench.smoke import __main__ as smoke

CHECK_OF = {
    "block_attention": "block_attention:64:fp32",
    "extend_attention": "extend_attention",
    "tree_attention": "tree_attention:64:bf16",
    "distill_loss": "distill_loss:bf16",
    "adjust_logits": "adjust_logits",
    "choose_tokens": "choose_tokens",
    "perturb_logits": "choose_tokens",
    "top_candidates": "choose_tokens",
    "lookup": "lookup",
    "join_branch": "lookup",
    "build_tree": "trees",
    "accept_tree": "trees",
    "verify_tree": "trees",
    "verify_chain": "verify_chain",
    "compact_cache_": "compact_cache_",
    "skinny_linear": "skinny_linear",
    "int8_linear": "int8_linear",
    "decoder_layer": "decoder_layer",
}
"""By op, a check that holds it."""


def off(op):
    """The op with every number of its result wrong, and differently at every call."""
    calls = itertools.count(1)

    @functools.wraps(op)
    def wrong(*args, **options):
        number, found = next(calls), op(*args, **options)
        if found is None:
            return args[0].mul_(1 + number / 8)
        parts = [
            x if not isinstance(x, torch.Tensor) else x * (1 + number / 8) if x.is_floating_point() else x + number
            for x in (found if isinstance(found, tuple) else (found,))
        ]
        if isinstance(found, torch.Tensor):
            return parts[0]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

    return wrong


@pytest.mark.parametrize("op", CHECK_OF)
def test_a_check_finds_an_op_that_is_wrong(op, monkeypatch):
    assert smoke.run_here([CHECK_OF[op]], "cpu") == 0
    monkeypatch.setattr(bk, op, off(getattr(bk, op)))
    with pytest.raises(AssertionError):
        smoke.run_here([CHECK_OF[op]], "cpu")


@pytest.fixture
def script(monkeypatch):
    """The script with a program in the place of its checks': gives its exit status."""

    def run(program: str, *arguments: str) -> int:
        monkeypatch.setattr(smoke, "COMMAND", [sys.executable, "-c", program])
        return smoke.main(["--device", "cpu", *arguments])

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def test_what_fails_is_said_with_the_end_of_its_traceback(script, capfd):
    program = """if True:
    import os, sys
    name = sys.argv[-1]
    if name == "trees":
        raise RuntimeError("planted")
    if name == "answers":
        os.kill(os.getpid(), 9)
    print("found", *sys.argv[1:])
    """
    assert script(program, "kernels", "trees", "answers", "training") == 2
    said = capfd.readouterr().out
    ended = {line.split(",")[0] for line in said.splitlines() if line.startswith(("ok", "FAIL"))}
    assert ended == {"ok   kernels", "FAIL trees", "FAIL answers", "ok   training"}
    assert "found --here --device cpu kernels" in said and said.endswith("2 of 4 passed\n")
    assert "\nRuntimeError: planted\n" in said
    assert "ended by SIGKILL" in said


def test_one_that_hangs_is_stopped_with_all_it_started(script, capfd):
    began = time.monotonic()
    assert script(WORK.format("63.25"), "--seconds", "1", "trees") == 1
    assert time.monotonic() - began < 10 and not left_of("63.25")
    said = capfd.readouterr().out
    assert said.startswith("FAIL trees, 1 s\nbefore\n") and 'File "<string>", line 1 in <module>' in said
    assert said.endswith("stopped after 1 s\n0 of 1 passed\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "no check 'nothing' on cpu; allowed: kernels, block_attention:64:fp32, "),
        (["limits"], "no check 'limits' on cpu; allowed: kernels, "),
        (["--device", "tpu"], "device is 'tpu'; allowed here: "),
        (["--at-once", "0"], "--at-once is 0, --seconds 100; allowed: at least 1, above 0"),
    ],
    ids=str,
)
def test_what_is_not_allowed(script, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        script("raise SystemExit('not to be run')", *arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_check_outlives_the_script(number):
    mark = f"64.{number:02d}"
    program = "import sys\nfrom bench.smoke import __main__ as smoke\n"
    program += f"smoke.COMMAND = [sys.executable, '-c', {WORK.format(mark)!r}]\n"
    command = [sys.executable, "-c", program + "sys.exit(smoke.main(['--device', 'cpu', 'trees']))"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not subprocess.run(["pgrep", "-fx", f"sleep {mark}"], capture_output=True).stdout:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + number and "Traceback" not in said and not left_of(mark)


@pytest.mark.slow
def test_all_pass_on_the_host():
    """In one process, which imports once; two of them also as the script runs them."""
    command = [sys.executable, "-m", "bench.smoke", "--device", "cpu"]
    names = smoke.names_for("cpu")
    for arguments, end in (["--here", *names], ""), (["kernels", "trees"], "2 of 2 passed\n"):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and done.stdout.endswith(end), done.stdout + done.stderr
