"""Kernels under test share all their work among the threads, however little it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from advkd import ops


@pytest.fixture(autouse=True)
def shared_work() -> Iterator[None]:
    if ops.extension is None:
        yield
        return
    before = ops.extension.set_worth_sharing(0.0)
    yield
    ops.extension.set_worth_sharing(before)
