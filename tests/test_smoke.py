"""bench.smoke: all pass on the CPU, and it reports what fails, what hangs and what is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import smoke, smoke_ops

ROOT = Path(__file__).parent.parent
PLANTED = """
import os, subprocess, sys, time

def hang(device):
    child = subprocess.Popen(["sleep", "300"])
    open({pid!r}, "w").write(str(child.pid))
    time.sleep(300)

if "--here" in sys.argv and "hang" in sys.argv:  # at once: importing takes longer than the limit
    hang("cpu")
from bench import smoke, smoke_ops

def wrong(device):
    op = smoke_ops.bk.choose_tokens
    def off_by_one(logits, *rest):
        tokens, status = op(logits, *rest)
        return tokens + next(off), status
    off = iter(range(9))
    smoke_ops.bk.choose_tokens = off_by_one
    smoke_ops.choose_tokens(device)

smoke.CHECKS = dict(fine=lambda device: "all well", wrong=wrong, hang=hang, crash=lambda device: os.abort())
smoke.COMMAND = [sys.executable, __file__]
sys.exit(smoke.main(sys.argv[1:]))
"""


@pytest.fixture
def planted(tmp_path):
    """A script that is bench.smoke with checks of its own; where the hanging one notes its child."""
    script, pid = tmp_path / "planted.py", tmp_path / "pid"
    script.write_text(PLANTED.format(pid=str(pid)))
    return [sys.executable, str(script), "--device", "cpu"], pid


def started(command: list[str]) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                            env=os.environ | {"PYTHONPATH": path})  # fmt: skip


def is_gone(pid: int) -> bool:
    """Ended, whether or not its parent has noted it."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["choose_tokens", "trees", "tree_attention:64:bf16"])
def test_a_check_passes(name):
    assert smoke.main(["--device", "cpu", "--here", name]) == 0


def test_what_is_wrong_is_seen(monkeypatch):
    """Each op, made a little wrong, fails its check."""
    real = smoke_ops.bk.tree_attention
    monkeypatch.setattr(smoke_ops.bk, "tree_attention", lambda *args, **more: 1.05 * real(*args, **more))
    with pytest.raises(AssertionError, match="whole cache: largest error"):
        smoke.main(["--device", "cpu", "--here", "tree_attention:64:bf16"])
    monkeypatch.setattr(smoke_ops.bk, "compact_cache_", lambda *args, **more: None)
    with pytest.raises(AssertionError):
        smoke.main(["--device", "cpu", "--here", "compact_cache_"])


def test_a_fault_is_a_line_and_the_exit_status(planted):
    command, _ = planted
    process = started([*command, "fine", "wrong", "crash"])
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    lines = said.splitlines()
    assert any(line.startswith("ok   fine, ") for line in lines) and "     all well" in lines
    assert any(line.startswith("FAIL wrong, ") for line in lines) and "AssertionError" in said
    assert any(line.startswith("FAIL crash, ") for line in lines) and "ended by SIGABRT" in lines
    assert lines[-1] == "1 of 3 passed"


def test_a_hang_is_killed_with_its_children(planted):
    command, pid = planted
    process = started([*command, "--seconds", "1", "hang"])
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and said.splitlines()[-1] == "0 of 1 passed"
    assert "FAIL hang, " in said and "stopped after 1 s" in said and "in hang" in said
    assert is_gone(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_children_end_with_it(planted, number):
    command, pid = planted
    process = started([*command, "hang"])
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "Traceback" not in said
    assert is_gone(int(pid.read_text()))


def test_what_is_not_there_is_refused(capsys):
    for arguments, message in (
        (["--device", "tpu"], "device is 'tpu'; allowed here: "),
        (["--device", "cpu", "choose"], "no check 'choose' on cpu; allowed: kernels, "),
        (["--device", "cpu", "limits"], "no check 'limits' on cpu; allowed: kernels, "),
        (["--device", "cpu", "--at-once", "0"], "--at-once is 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            smoke.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_all_pass_on_the_cpu():
    process = started([sys.executable, "-m", "bench.smoke", "--device", "cpu"])
    said = process.communicate(timeout=900)[0]
    count = len(smoke.names_for("cpu"))
    assert process.returncode == 0 and said.splitlines()[-1] == f"{count} of {count} passed", said
