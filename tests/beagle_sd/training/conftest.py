"""States to train on, and a run on them that nothing interrupted, for all tests of training."""

from __future__ import annotations

import pytest
from models import small_target
from shard_cases import write_states
from training_cases import trainer_of


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    return write_states(tmp_path_factory.mktemp("states"), small_target())


@pytest.fixture(scope="package")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(data, folder)
    trainer.run()
    return trainer, folder
