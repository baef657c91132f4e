"""The engine's convolutions: every algorithm and instruction set against float64."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops

sys.path.insert(0, str(Path(__file__).parent))
from one_convolution import Geometry, carried_out, convolved, numbers_of

DIRECT, WINOGRAD2, WINOGRAD4 = ALGORITHMS = (0, 1, 2)
GAP = 3  # channels before those that are read

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

# By how much roundings of what Winograd's last transformation sums grow, against the root mean
# square of its result: for independent inputs and weights sum_j A[k, j]^2 |B_j|^2 |G_j|^2 / 3 at
# its largest k, in each of two dimensions (variances multiply).
GROWTH = {DIRECT: 1.0, WINOGRAD2: 1.7, WINOGRAD4: 31.5}
TRANSFORMATIONS = 24  # roundings of the transformations on the way of one product


def tolerance(algorithm: int, terms: int) -> float:
    """Of the root mean square. Roundings walk at random; 4 is for the worst of many elements."""
    roundings = terms + (0 if algorithm == DIRECT else TRANSFORMATIONS)
    return 4 * torch.finfo(torch.float32).eps / 2 * GROWTH[algorithm] * roundings**0.5


class Problem:
    """A convolution of random slices of wider tensors as a plan of one step, and its exact result.

    `folded`: with SiLU of the input, a residual where it is of the output's size, and a factor.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        geometry: Geometry = (3, 1, 1, 1, False),
        folded: bool = True,
    ):
        self.sizes, self.geometry, self.folded = sizes, geometry, folded
        B, H, W, C, D = sizes
        torch.manual_seed(sum(sizes))
        self.weight, self.bias = torch.randn(D, C, geometry[0], geometry[0]), torch.randn(D)
        # [gap, x, residual]
        self.x = torch.randn(B, H, W, GAP + C + D)
        self.truth = self.convolution()
        self.has_residual = folded and self.truth.shape[1:3] == (H, W)
        if self.has_residual:
            self.truth = self.truth + self.x[..., GAP + C :]
        if folded:
            self.truth = self.truth * 0.7

    def convolution(self) -> Tensor:
        x = self.x[..., GAP : GAP + self.sizes[3]].double()
        x = F.silu(x) if self.folded else x
        return convolved(x, self.weight, self.geometry, self.bias.double())

    def plan(self, algorithm: int) -> tuple[Any, Tensor]:
        """The plan, and the weights, which it does not keep alive."""
        assert ops.extension is not None
        B, H, W, C, D = self.sizes
        weights = torch.full((D + -(-D // 16) * 16 * C * self.geometry[0] ** 2,), float("nan"))
        weights[:D] = self.bias
        ops.extension.convolution_pack(
            self.sizes, *self.geometry, self.weight.data_ptr(), weights[D:].data_ptr()
        )
        step = numbers_of(self.sizes, self.geometry, self.folded, GAP)
        step |= {"algorithm": algorithm, "packed": D}
        if self.has_residual:
            step |= {"residual": 0, "residual_channel": GAP + C}
        pixels = self.truth.shape[1] * self.truth.shape[2]
        plan = ops.extension.Plan(
            buffers=[(0, H * W, GAP + C + D), (0, pixels, D)],
            ops=[("convolution", step, 0.7 if self.folded else 1.0)],
            arena=0, conditioning=0, classes=0, batch=B, weights=weights.data_ptr(),
            weights_size=weights.numel(),
        )  # fmt: skip
        return plan, weights

    def run(self, algorithm: int, threads: int = 1, images: slice = slice(None)) -> Tensor:
        """The result for some of the images; NaN where nothing was written."""
        plan, _weights = self.plan(algorithm)
        return carried_out(plan, self.x[images], self.truth.shape[1:], threads)

    def check(self, algorithm: int, threads: int = 1) -> None:
        got = self.run(algorithm, threads).double()
        terms = self.weight[0].numel() + 8  # the folded operations round, too
        size = self.truth.square().mean().sqrt() + self.truth.abs()
        error = float(((got - self.truth).abs() / size).max())
        assert error <= tolerance(algorithm, terms), error


# Sides around those of tiles, and of whole and shorter ones side by side, channels around those of
# vectors and panels, blocks of several images and of parts of one.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 2, 5, 3, 17),
    (3, 4, 4, 16, 16),
    (2, 7, 7, 20, 33),
    (1, 9, 6, 17, 70),
    (11, 4, 4, 40, 48),
    (3, 14, 13, 5, 64),
    (1, 3, 300, 18, 5),
    (2, 11, 10, 17, 20),
    (1, 6, 290, 8, 5),
    (1, 298, 15, 40, 3),
    (1, 70, 6, 130, 3),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(sizes: Any, algorithm: int, isa: str) -> None:
    Problem(sizes).check(algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_is_folded_in(algorithm: int, isa: str) -> None:
    Problem((2, 6, 7, 19, 18), folded=False).check(algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("side", [1, 3, 4, 7])
def test_nearest_upsampling(side: int, algorithm: int, isa: str) -> None:
    Problem((2, side, side + 1, 17, 20), (3, 1, 1, 1, True)).check(algorithm)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_strides_and_paddings(kernel: int, side: int, isa: str) -> None:
    for stride, before, after in itertools.product((1, 2), (0, 1), (0, 1)):
        if before >= kernel or after >= kernel or side + before + after < kernel:
            continue
        Problem((2, side, side + 1, 18, 20), (kernel, stride, before, after, False)).check(DIRECT)


@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
@pytest.mark.parametrize("paddings", [(0, 0), (0, 1), (1, 0)])
def test_winograd_with_less_padding(paddings: tuple[int, int], algorithm: int) -> None:
    Problem((2, 9, 6, 5, 7), (3, 1, *paddings, False)).check(algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sizes", [(1, 16, 16, 40, 70), (9, 7, 7, 20, 33), (3, 34, 10, 40, 33)])
def test_bits_depend_neither_on_threads_nor_on_the_batch(sizes: Any, algorithm: int) -> None:
    problem = Problem(sizes)
    whole = problem.run(algorithm)
    for threads in (1, 2, 3, 8):
        assert torch.equal(problem.run(algorithm, threads), whole)
    last = slice(sizes[0] - 1, sizes[0])
    assert torch.equal(problem.run(algorithm, 1, last), whole[last])


def test_many_weights_are_transformed_for_one_wave_of_blocks_after_the_other(isa: str) -> None:
    Problem((33, 16, 16, 128, 80)).check(WINOGRAD4)


def test_waves_do_not_change_bits() -> None:
    problem = Problem((33, 16, 16, 128, 80))
    whole = problem.run(WINOGRAD4)
    for threads in (2, 3):
        assert torch.equal(problem.run(WINOGRAD4, threads), whole)
    assert torch.equal(problem.run(WINOGRAD4, 1, slice(30, 32)), whole[30:32])


def chosen(sizes: Any, geometry: Any = (3, 1, 1, 1, False), threads: int = 1) -> int:
    assert ops.extension is not None
    algorithm: int = ops.extension.convolution_plan(sizes, *geometry, threads)[0]
    return algorithm


def test_the_rule_saves_multiplications_where_there_is_work() -> None:
    for sizes in ((16, 32, 32, 128, 128), (16, 4, 4, 256, 256), (1, 32, 32, 128, 128)):
        assert chosen(sizes) == WINOGRAD4
    for sizes in ((32, 28, 28, 16, 16), (16, 14, 14, 48, 48), (32, 7, 7, 96, 96)):
        assert chosen(sizes) == WINOGRAD4


def test_the_rule_spares_memory_where_weights_are_used_once() -> None:
    # A single tile: 36 weights are read for what takes 16 x 9 products without Winograd.
    assert chosen((1, 4, 4, 512, 512)) != WINOGRAD4
    assert chosen((1, 1, 1, 256, 256)) == DIRECT


def test_the_rule_knows_what_winograd_cannot() -> None:
    assert chosen((16, 32, 32, 128, 128), (3, 2, 1, 1, False)) == DIRECT
    assert chosen((16, 32, 32, 128, 128), (1, 1, 0, 0, False)) == DIRECT


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel serves such a convolution"):
        chosen((1, 8, 8, 4, 4), (5, 1, 2, 2, False))
    with pytest.raises(ValueError, match="no kernel serves such a convolution"):
        Problem((1, 8, 8, 4, 4), (3, 2, 1, 1, False)).run(WINOGRAD4)
