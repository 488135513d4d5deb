"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# a console keeps the width that it finds when it is made, which a worker of pytest-xdist inherits; the tests say theirs
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The sizes are small: threads would only wait for each other, for long where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
