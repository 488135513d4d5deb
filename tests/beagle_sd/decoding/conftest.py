"""A target and a draft that it often agrees with, for the tests of rounds and engines."""

from __future__ import annotations

import pytest
from models import agreeable_target, small_draft


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)
