"""Distances against known answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from advkd.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)

_EPS = np.finfo(np.float64).eps


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(3))


def _sample(rng: np.random.Generator, count: int, mean: np.ndarray, root: np.ndarray) -> Any:
    """`count` points whose sample mean is `mean` and sample covariance root root^T, exactly."""
    points = rng.standard_normal((count, len(mean)))
    points -= points.mean(0)
    whitener = np.linalg.cholesky(np.linalg.inv(np.cov(points.T)))
    return points @ whitener @ root.T + mean


# Fréchet distance


def test_frechet_of_two_gaussians(rng: np.random.Generator) -> None:
    mean_a, mean_b = rng.standard_normal((2, 6))
    root_a, root_b = rng.standard_normal((2, 6, 6))
    a, b = _sample(rng, 50, mean_a, root_a), _sample(rng, 80, mean_b, root_b)
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    geometric = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * geometric
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_diagonals(rng: np.random.Generator) -> None:
    a = _sample(rng, 40, np.zeros(4), np.diag([2.0, 0.0, 1.0, 0.0]))
    b = _sample(rng, 40, np.array([0.0, 0.0, 0.0, 5.0]), np.diag([0.0, 3.0, 4.0, 0.0]))
    # 5^2 + (2 - 0)^2 + (0 - 3)^2 + (1 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(47, rel=1e-12)


@pytest.mark.parametrize("count", [2, 20, 200])
def test_frechet_of_equal_sets_is_zero(rng: np.random.Generator, count: int) -> None:
    a = 10 * rng.standard_normal((count, 64)) @ rng.standard_normal((64, 64))
    a[:, 5] = 3.0  # a dead feature
    scale = np.trace(np.cov(a.T))
    assert frechet_distance(a, rng.permutation(a)) <= 64**2 * _EPS * scale
    moved = frechet_distance(a, a + np.arange(64.0))
    assert moved == pytest.approx((np.arange(64.0) ** 2).sum(), abs=64**2 * _EPS * scale)


def test_frechet_survives_a_huge_mean(rng: np.random.Generator) -> None:
    a = rng.standard_normal((100, 8))
    assert frechet_distance(a + 1e6, 2 * a + 1e6) == pytest.approx(
        frechet_distance(a, 2 * a), rel=1e-6
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\)"),
        (np.zeros((5, 3)), np.zeros((1, 3)), "1 samples are too few"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "not finite"),
    ],
)
def test_distances_refuse_bad_features(a: np.ndarray, b: np.ndarray, message: str) -> None:
    for distance in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=message):
            distance(a, b, **({"k": 1} if distance is precision_recall else {}))


# Kernel distance


def test_kernel_distance_by_hand(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 7, 4))

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return (float(p @ q) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 42
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 49
    # Subsets of everything: each is the same sum in another order.
    assert kernel_distance(x, y, subsets=3) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased(rng: np.random.Generator) -> None:
    values = np.array(
        [
            kernel_distance(*rng.standard_normal((2, 60, 8)), subsets=4, subset_size=30)
            for _ in range(300)
        ]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()
    apart = kernel_distance(rng.standard_normal((60, 8)), rng.standard_normal((60, 8)) + 1)
    assert apart > 10 * values.std()


def test_kernel_distance_repeats(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 90, 8))
    first = kernel_distance(a, b, subset_size=30)
    assert kernel_distance(a, b, subset_size=30) == first
    assert kernel_distance(a, b, subset_size=30, seed=1) != first


# Precision and recall


def test_precision_recall_of_a_lost_mode(rng: np.random.Generator) -> None:
    cluster = rng.standard_normal((100, 4))
    real = np.concatenate([cluster, cluster + 1000])
    assert precision_recall(real, cluster) == (1.0, 0.5)
    assert precision_recall(cluster, real) == (0.5, 1.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 200) == (0.0, 0.0)


def test_precision_recall_by_hand() -> None:
    real = np.array([[0.0], [1.0], [3.0], [10.0]])
    fake = np.array([[-1.0], [2.5], [20.0], [20.0]])
    # k=1 radii: reals 1, 1, 2, 7; fakes 3.5, 3.5, 0, 0.
    assert precision_recall(real, fake, k=1) == (0.5, 0.75)
    # k=2 radii: reals 3, 2, 3, 9; fakes 21, 17.5, 17.5, 17.5.
    assert precision_recall(real, fake, k=2) == (0.5, 1.0)
    with pytest.raises(ValueError, match="at least 5"):
        precision_recall(real, fake, k=4)


def test_precision_recall_in_pieces(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = rng.standard_normal((2, 50, 3))
    whole = precision_recall(real, fake + 1.5)
    monkeypatch.setattr("advkd.evaluation.distances._ROWS", 7)
    assert precision_recall(real, fake + 1.5) == whole
    assert 0 < whole[0] < 1


# Sliced Wasserstein distance


@pytest.mark.parametrize("counts", [(9, 9), (9, 5), (1, 6)])
def test_sliced_wasserstein_in_one_dimension(
    rng: np.random.Generator, counts: tuple[int, int]
) -> None:
    a, b = (rng.uniform(-1, 1, (n, 1)) for n in counts)
    # Every direction is +1 or -1 and gives the whole distance.
    expected = scipy.stats.wasserstein_distance(a[:, 0], b[:, 0])
    assert sliced_wasserstein(a, b, projections=5) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_a_shift(rng: np.random.Generator) -> None:
    a = rng.uniform(-1, 0, (40, 36))
    assert sliced_wasserstein(a, a[::-1]) == 0.0
    # A shift d moves every projection by |d . direction|; on the sphere that is |d| / sqrt(D)
    # times the mean of a normal's modulus, up to 1 / D and to the chance of 20,000 directions.
    moved = sliced_wasserstein(a, a + 0.5, projections=20_000)
    assert moved == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)


def test_sliced_wasserstein_repeats(rng: np.random.Generator) -> None:
    a, b = rng.uniform(-1, 1, (2, 60, 20))
    first = sliced_wasserstein(a, b)
    assert sliced_wasserstein(a, b) == first
    assert sliced_wasserstein(a, b, seed=1) != first
