"""What surrounds the code: the workflow, the hooks and the bug form do what CONTRIBUTING.md says of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="an archive has no .github")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_must_pass_with_the_oldest_and_the_newest():
    job = read(".github/workflows/ci.yml")["jobs"]["ci"]
    assert any(step.get("run") == ".ci/run" for step in job["steps"]) and (ROOT / ".ci/run").is_file()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    assert job["strategy"]["matrix"]["torch"] == ["torch==2.11.*", "torch"]
    requires = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in requires and '"torch>=2.11"' in requires
    variables = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"TORCH", "OTHER_TORCH"} <= variables & set(job["env"])


def test_the_hooks_check_and_format():
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    entries = {hook["entry"].split(" --")[0]: hook["additional_dependencies"] for hook in repository["hooks"]}
    assert set(entries) == {"ruff check", "ruff format"}
    assert len({tuple(pins) for pins in entries.values()}) == 1, "one version of ruff"


def test_the_bug_form_asks_for_the_report_and_the_seed():
    fields = {field["id"]: field for field in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "python -m beagle_kernels" in fields["report"]["attributes"]["label"]
    assert fields["report"]["validations"]["required"] and "seed" in fields


def test_a_checkout_travels_with_half_the_kit_to_a_gpu_machine():
    """docs/gpu.md: 64 MiB a command, a file of the kit 45.5 of them, half a KiB a file for what carries it."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 500
    assert sum(file.stat().st_size + 512 for file in files) <= 17.5 * 2**20
