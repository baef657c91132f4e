"""The emulated CUDA part of the extension, built once for all of this folder's tests.

ADVKD_CUDA_EMULATION names a module that tests/cuda_emulation/build.py made before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_emulation"))
import build


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = os.environ.get("ADVKD_CUDA_EMULATION")
    if built:
        return build.load(Path(built))
    pytest.importorskip("pybind11", reason="the emulation is bound to Python by pybind11")
    if build.compiler() is None:
        pytest.skip("no C++ compiler was found")
    return build.load(build.build(tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture
def cuda(emulation: Any) -> Iterator[Any]:
    """The emulation; afterwards everything must be destroyed, waited for, and on device 0."""
    emulation.set_order(0)
    emulation.launches()
    yield emulation
    emulation.fail_call(0)
    emulation.set_devices(1)
    assert emulation.device() == 0
    assert emulation.live_objects() == {}
    assert emulation.pending() == 0
