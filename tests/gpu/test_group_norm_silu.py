"""The C++ CUDA GroupNorm-SiLU on a real GPU, against float64 and bit for bit against itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from advkd import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))
from norm_cases import EPS, LARGE, LAYOUTS, SHAPES, TYPES, inputs, worst

pytestmark = pytest.mark.gpu

CIFAR10 = [((4, 128, 32, 32), 32), ((4, 384, 32, 32), 32), ((4, 512, 4, 4), 32)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, *LARGE, *CIFAR10])
def test_against_float64(
    shape: tuple[int, ...], groups: int, memory_format: Any, dtype: torch.dtype
) -> None:
    x, parameters = inputs(shape, dtype, memory_format, "wbst", mean=2.0)
    mode = ops.CudaGroupNorm()
    found = []
    for _ in range(2):
        given = [None if p is None else p.cuda() for p in parameters]
        with torch.inference_mode(), mode:
            y = ops.group_norm_silu(x.cuda(), *given[:2], groups, EPS, "silu", *given[2:])
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert found[0].stride() == x.stride()
    # The device's exponential and quotient are off by some units in the last place.
    assert worst(found[0].cpu(), x, parameters, groups, True) < 2
