"""Kernels under test share all their work among the threads, however little it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from advkd import ops

WORTH_SHARING = 3e5  # cycles; as csrc/cpu/thread_pool.cpp has it


@pytest.fixture(autouse=True)
def shared_work() -> Iterator[None]:
    if ops.extension is None:
        yield
        return
    ops.extension.set_worth_sharing(0.0)
    yield
    ops.extension.set_worth_sharing(WORTH_SHARING)
