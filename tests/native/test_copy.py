"""The copy that benchmarks measure bandwidth by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.mark.parametrize("count", [0, 1, 17, 1 << 18, 200_001])
@pytest.mark.parametrize("offset", [0, 1])
def test_everything_is_copied_and_nothing_else(count: int, offset: int) -> None:
    x, y = torch.randn(count + offset), torch.full((count + offset + 1,), -1.0)
    native.module().copy_float32(x[offset:].data_ptr(), y[offset:].data_ptr(), count, 2)
    assert torch.equal(y[offset:-1], x[offset:])
    assert y[-1] == -1
