"""A command's whole output is kept, it ends in its time, and with whoever started it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import processes

ROOT = Path(__file__).resolve().parents[2]
WORK = "import subprocess, sys, time; subprocess.Popen(['sleep', '{}']); print('before', flush=True); time.sleep(60)"


def left_of(mark: str) -> bool:
    """Whether the `sleep` that a step started is still there, two seconds later."""
    for _ in range(20):
        if not subprocess.run(["pgrep", "-fx", f"sleep {mark}"], capture_output=True).stdout:
            return False
        time.sleep(0.1)
    return True


def test_gpu_check_stops_a_step_that_hangs(tmp_path):
    log = tmp_path / "log"
    done = processes.run([sys.executable, "-c", WORK.format("61.25")], 1, log)
    assert done["status"] == "stopped after 1 s" and "before" in done["output"]
    assert done["seconds"] < 1 + processes.GRACE
    assert "KeyboardInterrupt" in log.read_text() and not left_of("61.25")
    assert processes.run([sys.executable, "-c", "raise SystemExit(3)"], 60, log)["status"] == "failed with 3"
    assert "output" not in processes.run([sys.executable, "-c", "print('said')"], 60, log)
    assert log.read_text() == "said\n"


def test_a_step_deaf_to_sigint_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    done = processes.run([sys.executable, "-c", deaf], 1, tmp_path / "log")
    assert done["status"] == "stopped after 1 s" and 2 <= done["seconds"] < 10


def test_a_long_log_is_cut_in_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LARGEST", 100)
    processes.run([sys.executable, "-c", "print('a' * 99, 'b' * 99)"], 60, log := tmp_path / "log")
    assert log.read_text() == "a" * 50 + "\n[...]\n" + "b" * 49 + "\n"


STEP = """
import sys
from pathlib import Path
from bench import processes
from bench.gpu import check as gpu_check
work, out = sys.argv[1:]
gpu_check.environment = lambda: {"gpu": "a test's", "sources": "abc"}
gpu_check.Steps.round = lambda self, name, seconds: processes.run([sys.executable, "-c", work], 50, self.logs / "r.txt")
processes.end_on_signals()
sys.exit(gpu_check.main([out, "round", "tune"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda x: x.name)
def test_a_step_ends_with_the_script(tmp_path, number):
    """And all that it started; what it had is in the record, but for SIGKILL, and nothing further begins."""
    out, log, mark = tmp_path / "gpu.json", tmp_path / "gpu.logs" / "r.txt", f"62.{number:02d}"
    script = subprocess.Popen([sys.executable, "-c", STEP, WORK.format(mark), out], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not log.exists() or "before" not in log.read_text():
        assert script.poll() is None
        time.sleep(0.1)
    script.send_signal(number)
    assert script.wait(20) == (-9 if number == signal.SIGKILL else 128 + number)
    assert not left_of(mark)
    steps = json.loads(out.read_text())["steps"]
    if number != signal.SIGKILL:
        assert steps["round"]["status"] == f"stopped by {number.name}" and "before" in steps["round"]["output"]
    assert "tune" not in steps
