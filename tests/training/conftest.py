"""Stores of trajectories that the tests of training share."""

from __future__ import annotations

import pytest

from advkd.data.trajectories import Trajectories

from .tiny import sampled


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return sampled(tmp_path_factory.mktemp("unconditional"))


@pytest.fixture(scope="session")
def store_with_classes(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return sampled(tmp_path_factory.mktemp("classes"), num_classes=3)
