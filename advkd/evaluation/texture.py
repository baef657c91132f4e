"""What fine texture images have: patches of a Laplacian pyramid, and the power at each frequency.

FD's features are of a classifier's last layer, which reads shapes: a woven grid over cloth or
speckled dark areas hardly move them. The two distances here see such damage, and little of shape.
Deterministic and in float64, but for patches, which are float32; `docs/protocol.md` says what they
mean and what they were tried on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from advkd.evaluation.distances import wasserstein

PATCH = 7  # pixels of a patch's side
PATCHES = 16  # of each image and band
DIRECTIONS = 128
FAINT = 4 * 2 / 255  # four 8-bit levels: what is fainter counts in full, what is stronger less
FLOOR = (2 / 255) ** 2 / 12  # the power of rounding to 8 bits


def laplacian_bands(x: Tensor) -> list[Tensor]:
    """The bands of a Laplacian pyramid (Burt & Adelson 1983), finest first: x (N, C, S, S).

    Each band is what a level loses by being halved, (N, C, s, s) with s = S, S/2, ... down to two
    patches. What remains below the last band is shape rather than texture, and is left out.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    channels = x.shape[1]
    weight = (kernel[:, None] * kernel).expand(channels, 1, 5, 5)

    def blurred(z: Tensor) -> Tensor:
        return F.conv2d(F.pad(z, (2, 2, 2, 2), mode="reflect"), weight, groups=channels)

    bands: list[Tensor] = []
    while not bands or x.shape[-1] >= 2 * PATCH:
        low = blurred(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = 4 * low
        bands.append(x - blurred(spread))
        x = low
    return bands


def band_patches(x: Tensor, seed: int) -> list[np.ndarray]:
    """Random patches of every band of x (N, C, S, S): float32 (N * PATCHES, C * p * p) each.

    Values are compressed by arcsinh(v / FAINT), so that a faint grid is not drowned by edges.
    """
    rng = np.random.default_rng(seed)
    found = []
    for band in laplacian_bands(x.double()):  # which no autocast makes anything else
        values = np.arcsinh(band.cpu().numpy() / FAINT)
        N, C, side, _ = values.shape
        p = min(PATCH, side)
        windows = np.lib.stride_tricks.sliding_window_view(values, (p, p), axis=(2, 3))
        top, left = rng.integers(0, side - p + 1, (2, N, PATCHES))
        chosen = windows[np.arange(N)[:, None], :, top, left]
        found.append(chosen.reshape(N * PATCHES, C * p * p).astype(np.float32))
    return found


def texture_distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Sliced Wasserstein-1 distance of `projected` patches, averaged over the bands; 0 is best.

    (Karras et al. 2018, section 5, who divide each side by its own deviation; that would hide a
    blur and a change of contrast.)
    """
    return float(np.mean([wasserstein(x, y) for x, y in zip(a, b, strict=True)]))


def power_spectra(x: Tensor) -> np.ndarray:
    """The power of each image of x (N, C, S, S) at whole radial frequencies: float64 (N, bins).

    Column k - 1 averages the squared Fourier coefficients at k periods a side (1 .. S / sqrt 2)
    over directions and channels. A Hann window keeps the sides' jump out.
    """
    side = x.shape[-1]
    hann = np.hanning(side + 2)[1:-1]
    window = np.outer(hann, hann)
    values = x.cpu().numpy().astype(np.float64)
    values = values - values.mean(axis=(2, 3), keepdims=True)
    power = np.abs(np.fft.fft2(values * window)) ** 2 / (window**2).sum()
    frequency = np.fft.fftfreq(side) * side
    radius = np.rint(np.hypot(frequency[:, None], frequency)).astype(int)
    bins = range(1, radius.max() + 1)
    return np.stack([power[:, :, radius == k].mean(axis=(1, 2)) for k in bins], axis=1)


def decibels(power: np.ndarray) -> np.ndarray:
    """Power in dB, above the power that rounding to 8 bits has."""
    found: np.ndarray = 10 * np.log10(power + FLOOR)
    return found


def spectrum_distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far apart the images' `power_spectra` a (N, bins) and b (M, bins) are, in dB; 0 is best.

    At each frequency the Wasserstein-1 distance between the images' powers in dB, averaged over
    frequencies.
    """
    return wasserstein(np.sort(decibels(a), axis=0), np.sort(decibels(b), axis=0))
