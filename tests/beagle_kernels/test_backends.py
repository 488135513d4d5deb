"""Which backend serves a CUDA device, with an extension and a driver that are not there."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import beagle_kernels as bk
from beagle_kernels import BackendError, backends, extension, triton
from beagle_kernels.__main__ import main

CUDA = [torch.device("cuda", index) for index in range(2)]
REASON = "no kernel image is available for execution on the device (built with CUDA 13.0 for 80;90; the driver serves CUDA 13.0, the device is sm_75)"  # noqa: E501


@pytest.fixture
def driver(monkeypatch):
    """An extension with a CUDA half, and the numbers of the devices that it was asked about; cuda:0 is too old."""
    asked = []

    def why_not(index: int) -> str | None:
        asked.append(index)
        return REASON if index == 0 else None

    def forget():
        extension._unserved.cache_clear(), triton._too_old.cache_clear(), backends._resolved.clear()

    monkeypatch.setattr(
        extension,
        "_C",
        SimpleNamespace(no_cuda="", archs="80;90", instruction_set="avx2", cuda=SimpleNamespace(why_not=why_not)),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    forget()
    yield asked
    forget()


def test_auto_takes_cuda_only_on_a_device_that_the_binary_can_serve(driver):
    for _ in range(3):
        assert [backends.resolve("choose_tokens", "auto", device, torch.float32) for device in CUDA] == [
            "reference",
            "cuda",
        ]
        assert [backends.resolve("build_tree", "auto", device) for device in CUDA] == ["reference", "cuda"]
    assert driver == [0, 1], "each device is asked once, whatever the op"


def test_cuda_asked_for_by_name_raises_with_the_driver_s_reason(driver):
    with pytest.raises(BackendError, match=r"'cuda' cannot serve tensors on 'cuda:0': .*the device is sm_75\)"):
        backends.resolve("verify_tree", "cuda", CUDA[0])
    assert backends.resolve("verify_tree", "cuda", CUDA[1]) == "cuda"


def test_no_driver_is_asked_for_tensors_on_the_cpu(driver):
    assert backends.resolve("choose_tokens", "auto", torch.device("cpu")) == "cpu"
    assert backends.why_not("choose_tokens", "cuda", torch.device("cpu")) == "it takes CUDA tensors"
    assert driver == []


def test_the_report_gives_the_reason(driver, capsys):
    main()
    assert f"CUDA executor: the extension's kernels cannot run on cuda:0: {REASON}" in capsys.readouterr().out


def test_the_report_on_a_machine_with_such_a_card(driver, monkeypatch, capsys):
    for name, fake in {
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda index: "Tesla T4",
        "get_device_capability": lambda index: (7, 5),
        "device": lambda index: torch.no_grad(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    main()
    told = capsys.readouterr().out.split("Ops on cuda")[1]
    assert f"not cuda: the extension's kernels cannot run on cuda:0: {REASON}" in told
    assert "not triton: cuda:0 has compute capability 7.5; allowed: 8.0 or later" in told


@pytest.mark.parametrize("capability, serves", [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_triton_is_for_cards_from_8_0_on(driver, monkeypatch, capability, serves):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert backends.resolve("tree_attention", "auto", CUDA[0], torch.bfloat16) == serves
    if serves == "reference":
        with pytest.raises(BackendError, match="'triton' cannot serve.*has compute capability 7.5; allowed: 8.0"):
            backends.resolve("tree_attention", "triton", CUDA[0], torch.bfloat16)


def test_the_report_describes_this_machine(capsys):
    """What a bug form asks for, without a home folder or a user's name."""
    main()
    report = capsys.readouterr().out
    for part in (
        f"beagle_kernels {bk.__version__}",
        f"torch {torch.__version__.partition('+')[0]}",
        f"Python {platform.python_version()}",
    ):
        assert part in report
    assert re.search(r"^CPU: .+, \d+ cores, \d+ threads$", report, re.M) and re.search(
        r"^GPU: .*driver: ", report, re.M
    )
    assert str(Path.home()) not in report and len(report.splitlines()) < 60
