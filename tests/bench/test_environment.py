"""What a number was taken on."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import torch

from bench import environment


def test_sources_are_what_is_run(tmp_path):
    """A hash that needs no git: of contents and names, not of what a build or a run leaves."""
    for name in ("setup.py", "bench/a.py", "csrc/cuda/k.cu", "tests/test_a.py", "python/beagle_sd/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    found = [environment.sources(tmp_path)]
    (tmp_path / "bench" / "results.json").write_text("{}")
    (tmp_path / "python" / "beagle_sd" / "__pycache__").mkdir()
    (tmp_path / "python" / "beagle_sd" / "__pycache__" / "b.pyc").write_text("2")
    assert environment.sources(tmp_path) == found[0]
    for name, text in (("csrc/cuda/k.cu", "2"), ("bench/a.py", "2"), ("tests/test_c.py", "1")):
        (tmp_path / name).write_text(text)
        found.append(environment.sources(tmp_path))
    (tmp_path / "bench" / "a.py").rename(tmp_path / "bench" / "b.py")
    assert len({*found, environment.sources(tmp_path)}) == 5


def test_versions_of_what_is_there_and_of_what_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert environment.versions("torch", "triton") == {"torch": torch.__version__, "triton": None}
    monkeypatch.delattr(torch, "__version__")  # as xgrammar has none
    assert environment.versions("torch") == {"torch": metadata.version("torch")}


def test_the_record_of_a_run_names_commit_sources_and_machine(monkeypatch):
    monkeypatch.setenv("BEAGLE_COMMIT", "abc")
    found = environment.environment()
    assert found["commit"] == "abc" and found["sources"] == environment.sources()
    own = environment.machine()
    assert (own["commit"], own["sources"], own["threads"]) == ("abc", found["sources"], torch.get_num_threads())
    assert found["torch"] == torch.__version__ and (found["gpu"] is None) != torch.cuda.is_available()
    assert environment.device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"


def test_a_command_that_is_missing_or_fails_says_nothing():
    assert environment.command_output(sys.executable, "-c", "print(1)") == "1"
    assert environment.command_output(sys.executable, "-c", "raise SystemExit(1)") is None
    assert environment.command_output("no-such-command") is None


def test_benchmarks_and_tuning_begin_without_transformers():
    """It imports Triton, which tuning on a CPU first has to ask for its interpreter."""
    names = "bench.timing, bench.tuning, bench.registry, bench.__main__"
    code = f"import sys, {names}; print({{'transformers', 'beagle_sd'}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
