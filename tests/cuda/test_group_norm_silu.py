"""The CUDA GroupNorm-SiLU, emulated: against float64, in every order of threads, twice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import ORDERS, guarded, nan_fill
from norm_cases import EPS, LARGE, LAYOUTS, SHAPES, TYPES, inputs, worst
from torch import Tensor

from advkd import ops


def run(
    cuda: Any, x: Tensor, parameters: list[Tensor | None], groups: int, silu: bool,
    align: int | None = None,
) -> Tensor:  # fmt: skip
    """y by the emulated kernel, everything between guard pages and nan_filled."""
    x, y = guarded(cuda, x, align), nan_fill(cuda, x, align)
    wide = [None if p is None else guarded(cuda, p) for p in parameters]
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    how = (x.data_ptr(), y.data_ptr(), str(x.dtype).removeprefix("torch."))
    last = not x.is_contiguous()
    floats = cuda.cuda_group_norm_silu_workspace(*how, sizes, last)
    workspace = nan_fill(cuda, torch.empty(floats))
    cuda.cuda_group_norm_silu(
        *how, tuple(0 if p is None else p.data_ptr() for p in wide), sizes, last, EPS, silu,
        workspace.data_ptr(), 0,
    )  # fmt: skip
    cuda.synchronize()
    return y


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_against_float64(
    cuda: Any, shape: tuple[int, ...], groups: int, memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    for given, silu in (("wb", True), ("wbst", True), ("t", False), ("", True)):
        x, parameters = inputs(shape, dtype, memory_format, given)
        y = run(cuda, x, parameters, groups, silu)
        assert worst(y, x, parameters, groups, silu) < 1
    assert set(cuda.launches()) == {"forward"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), LARGE)
def test_groups_that_are_cut(
    cuda: Any, shape: tuple[int, ...], groups: int, memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    x, parameters = inputs(shape, dtype, memory_format, "wbs", mean=3.0)
    y = run(cuda, x, parameters, groups, True)
    assert worst(y, x, parameters, groups, True) < 1
    assert set(cuda.launches()) == {"moments", "merge_kernel", "apply"}


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((1, 16, 12, 12), 4), ((1, 6, 75, 75), 2)])
def test_a_mean_of_ten_thousand_deviations_costs_no_digits(
    cuda: Any, shape: tuple[int, ...], groups: int, memory_format: torch.memory_format
) -> None:
    x, parameters = inputs(shape, torch.float32, memory_format, "wb", mean=1e4)
    y = run(cuda, x, parameters, groups, True)
    assert worst(y, x, parameters, groups, True) < 1


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 24, 7, 6), 3), ((1, 4, 96, 96), 1)])
def test_bits_do_not_depend_on_the_order_of_threads(
    cuda: Any, shape: tuple[int, ...], groups: int, memory_format: torch.memory_format
) -> None:
    x, parameters = inputs(shape, torch.bfloat16, memory_format, "wb")
    found = []
    for order in ORDERS:
        cuda.set_order(order)
        found.append(run(cuda, x, parameters, groups, True))
    assert all(torch.equal(found[0], y) for y in found[1:])
    assert worst(found[0], x, parameters, groups, True) < 1


def test_memory_that_does_not_begin_at_16_bytes(cuda: Any) -> None:
    x, parameters = inputs((1, 8, 5, 5), torch.float32, torch.channels_last, "wb")
    y = run(cuda, x, parameters, 2, True, align=8)
    assert worst(y, x, parameters, 2, True) < 1


def test_infinity_and_nan_stay_in_their_group(cuda: Any) -> None:
    for memory_format in LAYOUTS:
        x, parameters = inputs((1, 16, 4, 4), torch.float32, memory_format, "wb")
        x[0, 1, 2, 2] = float("nan")
        x[0, 14, 0, 0] = float("inf")
        y = run(cuda, x, parameters, 4, True)
        assert y[0, :4].isnan().all()
        assert y[0, 12:].isnan().all()
        assert y[0, 4:12].isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((1, 6, 4, 4), "does not divide"), ((1, 1 << 16, 1 << 15, 4), "fewer than 2\\^31"),
     ((1 << 19, 4, 4, 4), "a batch 2\\^21 groups"),
     ((1, 4096, 4, 1), "too many channels")],
)  # fmt: skip
def test_sizes_that_no_kernel_serves(cuda: Any, sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cuda.cuda_group_norm_silu(4096, 4096, "float32", (0, 0, 0, 0), sizes, True, EPS, True, 0, 0)
    with pytest.raises(ValueError, match="no CUDA kernel serves float64"):
        cuda.cuda_group_norm_silu_workspace(0, 0, "float64", (1, 4, 4, 4), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_a_network_runs_by_it(
    cuda: Any, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """As the loop's capture does: layers that know nothing of it, inside CudaGroupNorm."""
    from advkd.models.layers import GroupNormSiLU

    class Waiting:
        cuda_group_norm_silu_workspace = staticmethod(cuda.cuda_group_norm_silu_workspace)

        @staticmethod
        def cuda_group_norm_silu(*args: Any) -> None:
            cuda.cuda_group_norm_silu(*args)
            cuda.synchronize()

    norm = GroupNormSiLU(4, 16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, _ = inputs((2, 16, 6, 6), dtype, memory_format, "")
    mode = ops.CudaGroupNorm(Waiting, "cpu")
    with torch.inference_mode(), mode:
        y = norm(x)
    assert cuda.launches() == {"forward": 1}
    assert y.stride() == x.stride()
    parameters = [norm.weight.detach(), norm.bias.detach(), None, None]
    assert worst(y, x, parameters, 4, True) < 1
    with torch.no_grad():
        norm.weight.mul_(2)
    mode.refresh()
    with torch.inference_mode(), mode:
        y = norm(x)
    cuda.launches()
    assert worst(y, x, parameters, 4, True) < 1
