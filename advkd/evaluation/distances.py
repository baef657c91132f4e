"""Distances between two sets of images: FD, KID, precision and recall on features, SWD on pixels.

Everything is float64 and deterministic, whatever the program around it has as default dtype or
device. `docs/protocol.md` says what the figures mean.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
from numpy.typing import DTypeLike
from scipy.spatial.distance import cdist

PROJECTIONS = 512  # directions that images are projected on
_ROWS = 1024  # rows of a distance matrix held at once


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features a (N, D) and b (M, D); 0 is best.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with unbiased covariances
    (Heusel et al. 2017, eq. 6). At least 2 samples each.
    """
    a, b = _checked(a, b, least=2)
    # With S = R^T R, tr (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T. R comes
    # from the samples by QR: no root of an eigenvalue is taken, so singular covariances (fewer
    # samples than features, dead features) lose no digits.
    mean_a, mean_b = a.mean(0), b.mean(0)
    (root_a,) = scipy.linalg.qr((a - mean_a) / math.sqrt(len(a) - 1), mode="r")
    (root_b,) = scipy.linalg.qr((b - mean_b) / math.sqrt(len(b) - 1), mode="r")
    rows = a.shape[1]  # below these R is zero
    root_a, root_b = root_a[:rows], root_b[:rows]
    cross = scipy.linalg.svdvals(root_a @ root_b.T).sum()
    spread = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance (KID): unbiased MMD^2 with the kernel (x.y / D + 1)^3; may be below 0.

    a (N, D) and b (M, D); the mean over `subsets` random subsets of at most `subset_size` of each
    (Binkowski et al. 2018), chosen by `seed`. At least 2 samples each.
    """
    a, b = _checked(a, b, least=2)
    count = min(len(a), len(b), subset_size)
    rng = np.random.Generator(np.random.PCG64(seed))
    total = 0.0
    for _ in range(subsets):
        x = a[rng.choice(len(a), count, replace=False)]
        y = b[rng.choice(len(b), count, replace=False)]
        within = _cubic(x, x, diagonal=False) + _cubic(y, y, diagonal=False)
        total += within / (count * (count - 1)) - 2 * _cubic(x, y, diagonal=True) / count**2
    return total / subsets


def _cubic(x: np.ndarray, y: np.ndarray, *, diagonal: bool) -> float:
    """The sum of (x_i.y_j / D + 1)^3 over all pairs, or over those with i != j."""
    kernel = x @ y.T / x.shape[1] + 1.0
    kernel = kernel * kernel * kernel
    return float(kernel.sum() if diagonal else kernel.sum() - np.trace(kernel))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), both in [0, 1], 1 is best.

    real (N, D), fake (M, D). Precision is the share of fakes that lie no farther from some real
    sample than that one's k-th nearest other real sample; recall is the same with the roles
    swapped. More than k samples each.
    """
    real, fake = _checked(real, fake, least=k + 1)
    return _covered(real, fake, k), _covered(fake, real, k)


def _covered(centers: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of `points` inside the union of balls around `centers`."""
    inside = np.zeros(len(points), bool)
    for start in range(0, len(centers), _ROWS):
        rows = centers[start : start + _ROWS]
        # Column 0 of the sorted distances is the center itself.
        radii = np.partition(cdist(rows, centers), k, axis=1)[:, k]
        inside |= (cdist(rows, points) <= radii[:, None]).any(0)
    return float(inside.mean())


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, *, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """Sliced Wasserstein-1 distance: the mean over random unit directions; 0 is best.

    a (N, D) and b (M, D) are pixels of images, one image a row; N and M may differ. The unit is a
    distance of 1 in pixel space along a direction. (Rabin et al. 2011) This states the figure;
    `figures.measure` projects a part of the images after the other.
    """
    a, b = _checked(a, b, least=1)
    return wasserstein(projected(a, projections, seed), projected(b, projections, seed))


def projected(a: np.ndarray, projections: int, seed: int = 0) -> np.ndarray:
    """a (N, D) along random unit directions, each column sorted: (N, projections) of a's dtype."""
    return np.sort(a @ directions(a.shape[1], projections, a.dtype, seed), axis=0)


def directions(size: int, count: int, dtype: DTypeLike, seed: int = 0) -> np.ndarray:
    """Random unit vectors: (size, count)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found: np.ndarray = rng.standard_normal((size, count)).astype(dtype)
    found /= np.linalg.norm(found, axis=0)
    return found


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The Wasserstein-1 distance of sorted samples a (N, D) and b (M, D), averaged over columns."""
    n, m = len(a), len(b)
    if n == m:
        return float(np.abs(a - b).mean(dtype=np.float64))
    # Both quantile functions are constant between neighboring breaks: exact for N != M too.
    breaks = np.union1d(np.arange(n + 1) / n, np.arange(m + 1) / m)
    middle = (breaks[1:] + breaks[:-1]) / 2
    gap = np.abs(a[(middle * n).astype(int)] - b[(middle * m).astype(int)])
    return float((np.diff(breaks) @ gap).mean())


def _checked(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (N, D) and (M, D); ValueError for what cannot be compared."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"samples of shapes {a.shape} and {b.shape} cannot be compared")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{min(len(a), len(b))} samples are too few; at least {least} are needed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the samples hold values that are not finite")
    return a, b
