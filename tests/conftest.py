"""What the tests share: skipping of GPU tests, nan_filled outputs, hypothesis without deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from advkd import device, ops

# A loaded machine must not fail a test.
hypothesis.settings.register_profile("advkd", deadline=None)
hypothesis.settings.load_profile("advkd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def auto_is_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps trainings on the CPU where a machine has a GPU, but for the tests that are for one."""
    if "gpu" not in request.keywords:
        resolve = device.resolve
        monkeypatch.setattr(
            device, "resolve", lambda name: resolve("cpu" if name == "auto" else name)
        )


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and torch.empty_like return, so that an unwritten output shows."""

    def poisoning(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -1)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set of this machine."""
    if ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    if request.param not in ops.extension.isas():
        pytest.skip(f"this machine does not run {request.param}")
    before = ops.extension.isa()
    ops.extension.set_isa(request.param)
    yield request.param
    ops.extension.set_isa(before)


@pytest.fixture
def set_threads() -> Iterator[Any]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
