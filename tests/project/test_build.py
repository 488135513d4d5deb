"""The build: what a checkout without the extension does, ninja's file, and the CUDA half emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import beagle_kernels
from beagle_kernels import backends

ROOT = Path(beagle_kernels.__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(not CUDA.is_dir(), reason="the sources of csrc are not beside the package")


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def test_without_the_extension_the_reference_serves_and_the_report_says_how_to_build(tmp_path):
    shutil.copytree(ROOT / "beagle_kernels", tmp_path / "beagle_kernels", ignore=shutil.ignore_patterns("*.so"))
    # an editable install finds the extension for any copy of the package
    hidden = "import sys; sys.modules['beagle_kernels._C'] = None;"
    choose = (
        "import torch, beagle_kernels as bk;"
        "print(bk.choose_tokens(torch.eye(3), torch.arange(3), bk.Sampling.of(3))[0].tolist());"
        "print(bk.backends.resolve('choose_tokens', 'auto', torch.device('cpu')))"
    )
    result = run(sys.executable, "-c", hidden + choose, cwd=tmp_path)
    assert result.stdout.split("\n")[:2] == ["[0, 1, 2]", "reference"], result.stderr
    report = run(sys.executable, "-c", hidden + "from beagle_kernels.__main__ import main; main()", cwd=tmp_path)
    assert "pip install ." in report.stdout and "choose_tokens" in report.stdout, report.stderr


def test_an_extension_of_older_sources_is_as_none():
    stale = "import sys, types; sys.modules['beagle_kernels._C'] = types.ModuleType('beagle_kernels._C');"
    report = run(sys.executable, "-c", stale + "from beagle_kernels.__main__ import main; main()", cwd=ROOT)
    assert "the extension is not built (module 'beagle_kernels._C' has no attribute 'dtypes')" in report.stdout


def test_report_names_every_op():
    report = run(sys.executable, "-m", "beagle_kernels", cwd=ROOT).stdout
    for op in backends.table():
        assert op in report


def test_setup_refuses_what_it_cannot_do(tmp_path):
    environment = {"PATH": "/nonexistent", "BEAGLE_CUDA": "1"}
    folders = ("--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    command = (sys.executable, "setup.py", "-q", "build_ext", *folders)
    missing = run(*command, cwd=ROOT, env=environment)
    assert missing.returncode != 0 and "nvcc was not found" in missing.stderr
    wrong = run(*command, cwd=ROOT, env={"PATH": "/nonexistent", "BEAGLE_CUDA": "maybe"})
    assert wrong.returncode != 0 and "allowed: auto, 0, 1" in wrong.stderr


def ninja_file(tmp_path: Path, **environment: str) -> str:
    """What setup.py would have ninja do; a ninja that does nothing reads it here."""
    (tmp_path / "ninja.py").touch()
    (tmp_path / "pybind11.py").write_text("def get_include():\n    return 'include'\n", encoding="utf-8")
    folders = ("--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    command = (sys.executable, "setup.py", "-q", "build_ext", *folders)
    done = run(*command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr
    return (tmp_path / "build.ninja").read_text(encoding="utf-8")


@pytest.mark.parametrize("cxx, host", [("", None), ("/usr/bin/g++-12 -m64", "/usr/bin/g++-12"), ("ccache g++", "g++")])
def test_nvcc_takes_cxx_as_its_host_compiler(cxx, host, tmp_path):
    """To compile and to link, by ninja's file."""
    text = ninja_file(tmp_path, CXX=cxx, NVCC="/opt/nvcc", BEAGLE_CUDA="1", BEAGLE_CUDA_ARCHS="80,90a")
    commands = [line for line in text.splitlines() if "command = /opt/nvcc" in line]
    assert len(commands) == 2
    for command in commands:
        assert re.findall(r"-ccbin=(\S+)", command) == ([host] if host else [])
    assert """-DBEAGLE_ARCHS='"80;90a"'""" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="g++ or nm is not here")
def test_instruction_sets_share_no_symbol(tmp_path):
    """What is compiled once for each has symbols of its own alone: a shared one could come from a set that the machine
    does not have. Those of avx2 stand for all."""
    text = ninja_file(tmp_path, BEAGLE_CUDA="0")
    rule = re.search(r"rule cxx\n  command = (.+)", text)
    objects = re.findall(r"build (\w+_avx2\.o): cxx (\S+)\n  extra = (.+)", text)
    if not objects:
        pytest.skip("no x86-64")
    assert rule and {name for name, _, _ in objects} == {
        f"{stem}_avx2.o" for stem in ("rows", "products", "int8_product", "layer_steps")
    }
    for name, source, extra in objects:
        command = rule[1].replace("$extra", extra).replace("$in", source).replace("$out", name)
        built = run("sh", "-c", command, cwd=tmp_path)
        assert built.returncode == 0, built.stderr
        symbols = run("nm", "-C", "--defined-only", "--extern-only", name, cwd=tmp_path).stdout.splitlines()
        assert symbols and all("beagle::cpu::avx2::" in symbol for symbol in symbols), symbols


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
def test_the_cuda_kernels_emulated_on_the_host_give_what_the_host_executor_gives():
    """The very kernels, with their launches, barriers and shuffles; `make sanitize` also looks for races."""
    result = run("sh", str(CUDA.parent / "sanitize.sh"), "none")
    assert result.returncode == 0, result.stdout + result.stderr
