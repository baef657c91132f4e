"""Convolutions whose inputs are rounded to 8 bits: products of int8, and the same of float32.

Where inputs and scales are such that every sum is exact, both must give the very numbers of an
integer convolution; else the reference is float64 with inputs that lie between two levels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops

sys.path.insert(0, str(Path(__file__).parent))
from one_convolution import carried_out, convolved, numbers_of

DIRECT, WINOGRAD4, INT8 = 0, 2, 3
GAP = 5  # channels before those that are read
GEOMETRY = (3, 1, 1, 1, False)
LEVELS = 255

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

# One pixel, channels that fill neither a group of four nor a block, panels of one to five, pixels
# beside a tile's, an image that is cut into bands, a row that is longer than a band.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 2, 5, 3, 17),
    (3, 4, 4, 16, 16),
    (2, 7, 7, 20, 33),
    (1, 9, 6, 17, 70),
    (2, 14, 14, 48, 48),
    (1, 40, 37, 37, 5),
    (1, 3, 300, 130, 64),
]
GEOMETRIES = [
    (1, 1, 0, 0, False), (1, 2, 0, 0, False), (3, 2, 1, 1, False), (3, 2, 0, 1, False),
    (3, 1, 0, 0, False), (3, 1, 2, 1, False), (3, 1, 1, 1, True), (1, 1, 0, 0, True),
]  # fmt: skip


def has_int8() -> bool:
    assert ops.extension is not None
    found: bool = ops.extension.has_int8_products()
    return found


class Problem:
    """A convolution of slices of wider tensors, with inputs (q - zero) * step of random levels q.

    Step and scales are powers of two, so that every input and every sum is exact.
    """

    silu = False
    factor = 1.0
    affine: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None

    def __init__(self, sizes: tuple[int, int, int, int, int], geometry: Any = GEOMETRY):
        self.sizes, self.geometry = sizes, geometry
        B, H, W, C, D = sizes
        torch.manual_seed(sum(sizes))
        self.zero, self.step = 57, 2.0**-6
        self.levels = torch.randint(0, LEVELS + 1, (B, H, W, C))
        self.x = torch.randn(B, H, W, GAP + C + 1)
        self.x[..., GAP : GAP + C] = (self.levels - self.zero) * self.step
        self.weight = torch.randint(-127, 128, (D, C, geometry[0], geometry[0]), dtype=torch.int8)
        self.scales = 2.0 ** torch.randint(-9, -4, (D,))
        self.bias = torch.zeros(D)

    @property
    def range(self) -> tuple[float, float]:
        return -self.zero * self.step, (LEVELS - self.zero) * self.step

    def sums(self) -> Tensor:
        """The sums of products of whole numbers, int64 (B, H, W, D)."""
        x = (self.levels - self.zero).double()
        return convolved(x, self.weight, self.geometry).long()

    def truth(self) -> Tensor:
        """The result, float64."""
        y = self.sums().double() * (self.step * self.scales.double()) + self.bias.double()
        if self.residual is not None:
            y = y + self.residual.double()
        return y * self.factor

    def weights(self, algorithm: int) -> Tensor:
        """Bias, range and packed weights; room between them is NaN."""
        assert ops.extension is not None
        geometry = self.geometry
        if algorithm == INT8:
            size = ops.extension.convolution_int8_size(self.sizes, *geometry)
        else:
            size = ops.extension.convolution_plan(self.sizes, *geometry, 1)[1]
        D = self.sizes[4]
        weights = torch.full((D + 2 + size,), float("nan"))
        weights[:D], weights[D : D + 2] = self.bias, torch.tensor(self.range)
        packed = weights[D + 2 :]
        if algorithm == INT8:
            ops.extension.convolution_pack_int8(
                self.sizes, *geometry, self.weight.data_ptr(), self.scales.data_ptr(), self.range,
                packed.data_ptr(),
            )  # fmt: skip
        else:
            dense = self.weight.float() * self.scales[:, None, None, None]
            ops.extension.convolution_pack(
                self.sizes, *geometry, dense.data_ptr(), packed.data_ptr()
            )
        return weights

    def plan(self, algorithm: int, **changes: int) -> tuple[Any, Tensor]:
        """The plan, and the weights, which it does not keep alive."""
        assert ops.extension is not None
        B, H, W, _, D = self.sizes
        weights = self.weights(algorithm)
        step = numbers_of(self.sizes, self.geometry, self.silu, GAP) | {"x_range": D}
        step |= {"int8": D + 2} if algorithm == INT8 else {"packed": D + 2, "algorithm": algorithm}
        out = self.sums().shape[1:3]
        plan = ops.extension.Plan(
            buffers=[(0, H * W, self.x.shape[3]), (0, out[0] * out[1], D)],
            ops=[("convolution", step | changes, self.factor)],
            arena=0, conditioning=0, classes=0, batch=B, weights=weights.data_ptr(),
            weights_size=weights.numel(),
        )  # fmt: skip
        return plan, weights

    def run(self, algorithm: int, threads: int = 1, images: slice = slice(None)) -> Tensor:
        """The result for some of the images; NaN where nothing was written."""
        plan, _weights = self.plan(algorithm)
        return carried_out(plan, self.x[images], self.sums().shape[1:], threads)


@pytest.fixture
def int8(isa: str) -> None:
    """Runs the test with each instruction set that has dot products of bytes here."""
    if not has_int8():
        pytest.skip(f"{isa} has no dot products of bytes here")


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_exact(sizes: Any, int8: None) -> None:
    problem = Problem(sizes)
    unit = (problem.step * problem.scales).float()
    assert torch.equal(problem.run(INT8), problem.sums().float() * unit)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("side", [3, 7, 8])
def test_geometries(side: int, geometry: Any, int8: None) -> None:
    problem = Problem((2, side, side + 1, 18, 20), geometry)
    unit = (problem.step * problem.scales).float()
    assert torch.equal(problem.run(INT8), problem.sums().float() * unit)


def test_the_largest_sums_do_not_overflow(int8: None) -> None:
    for level, weight in ((255, 127), (255, -127), (0, 127), (0, -127)):
        for zero in (0, 255):
            problem = Problem((1, 1, 1, 3600, 16))
            problem.zero = zero
            problem.levels.fill_(level)
            problem.x[..., GAP : GAP + 3600] = (level - zero) * problem.step
            problem.weight.fill_(weight)
            unit = (problem.step * problem.scales).float()
            assert torch.equal(problem.run(INT8), problem.sums().float() * unit)
    with pytest.raises(ValueError, match="no kernel serves such a convolution of int8"):
        Problem((1, 1, 1, 3700, 16)).plan(INT8)


@pytest.mark.parametrize("algorithm", [DIRECT, WINOGRAD4])
@pytest.mark.parametrize("sizes", SIZES[:6])
def test_float32_multiplies_the_same_numbers(sizes: Any, algorithm: int, isa: str) -> None:
    problem = Problem(sizes)
    truth = problem.truth()
    size = truth.square().mean().sqrt() + truth.abs()
    error = float(((problem.run(algorithm).double() - truth).abs() / size).max())
    assert error <= 4e-7 * (1 if algorithm == DIRECT else 31.5) * (9 * sizes[3] + 24) ** 0.5, error


@pytest.mark.parametrize("algorithm", [DIRECT, INT8])
def test_inputs_are_rounded_after_silu(algorithm: int, isa: str) -> None:
    """With all that a convolution folds in."""
    if algorithm == INT8 and not has_int8():
        pytest.skip("no dot products of bytes here")
    problem = Problem((3, 7, 5, 21, 40))
    C = 21
    problem.silu, problem.factor, problem.bias = True, 0.7, torch.randn(40)
    values = torch.randn(3, 7, 5, C) * 2
    exact = F.silu(values.double()) / problem.step + problem.zero
    # Where a float32 could be rounded to the other neighbour, another number takes its place.
    values[((exact % 1) - 0.5).abs() < 0.01] = 0.0
    exact = F.silu(values.double()) / problem.step + problem.zero
    problem.x[..., GAP : GAP + C] = values
    problem.levels = exact.round().clamp(0, LEVELS).long()
    assert (problem.levels == LEVELS).any() and problem.levels.unique().numel() > 100
    truth = problem.truth()
    got = problem.run(algorithm).double()
    size = truth.square().mean().sqrt() + truth.abs()
    assert float(((got - truth).abs() / size).max()) <= 4e-6


def test_what_is_no_number_is_the_lowest_level(isa: str) -> None:
    for algorithm in (DIRECT, INT8) if has_int8() else (DIRECT,):
        for value, level in ((float("nan"), 0), (float("inf"), 255), (-3e38, 0), (3e38, 255)):
            problem = Problem((1, 2, 2, 4, 16), (1, 1, 0, 0, False))
            problem.x[0, 0, 1, GAP + 2] = value
            problem.levels[0, 0, 1, 2] = level
            assert torch.equal(problem.run(algorithm).double(), problem.truth()), (value, algorithm)


@pytest.mark.parametrize("sizes", [(1, 16, 16, 40, 70), (9, 7, 7, 20, 33), (2, 40, 37, 37, 5)])
def test_bits_depend_neither_on_threads_nor_on_the_batch(sizes: Any, int8: None) -> None:
    problem = Problem(sizes)
    problem.x = torch.randn_like(problem.x)
    whole = problem.run(INT8)
    for threads in (1, 2, 3, 8):
        assert torch.equal(problem.run(INT8, threads), whole)
    last = slice(sizes[0] - 1, sizes[0])
    assert torch.equal(problem.run(INT8, 1, last), whole[last])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.1, 1.0), (-1.0, -0.1), (0.0, 0.0), (0.0, 1e-44), (float("nan"), 1.0), (-1.0, float("nan")),
     (-1.0, float("inf")), (-3e38, 3e38), (1.0, -1.0)],
)  # fmt: skip
def test_ranges_that_are_none(low: float, high: float) -> None:
    problem = Problem((1, 2, 2, 4, 16))
    plan, weights = problem.plan(DIRECT)
    del plan
    problem.weights = lambda algorithm: weights  # type: ignore[method-assign]
    weights[16], weights[17] = low, high
    with pytest.raises(ValueError, match="its x_range is no range around 0"):
        problem.plan(DIRECT)


def test_int8_needs_a_kernel_and_a_range() -> None:
    assert ops.extension is not None
    problem = Problem((1, 2, 2, 4, 16))
    before = ops.extension.isa()
    ops.extension.set_isa("portable")
    try:
        with pytest.raises(ValueError, match="no kernel serves such a convolution of int8"):
            problem.plan(INT8)
    finally:
        ops.extension.set_isa(before)
