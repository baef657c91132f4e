"""The figures of a set of images, compared with reference images, and their spread over blocks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from advkd.data.images import ImageSet
from advkd.evaluation.distances import (
    PROJECTIONS,
    directions,
    frechet_distance,
    kernel_distance,
    precision_recall,
    projected,
    wasserstein,
)
from advkd.evaluation.features import FeatureNet, Features, class_shares, extract, rows_of
from advkd.evaluation.texture import (
    DIRECTIONS,
    band_patches,
    decibels,
    power_spectra,
    spectrum_distance,
    texture_distance,
)

VERSION = 2  # of what the figures mean; stored evaluations of another are not used
FIGURES = (
    *("fd", "kid", "precision", "recall", "swd"),
    *("texture_fd", "texture_swd", "spectrum", "classes"),
)
_ROWS = 256  # images looked at at once

Images = ImageSet | torch.Tensor  # or float32 (N, C, H, W) in [-1, 1]


class Measures(NamedTuple):
    """What the figures of N images are computed from.

    features: those of the network. pixels: (N, PROJECTIONS) float64, projected and sorted, since
    the pixels themselves may be more than memory holds. patches: of each band of their Laplacian
    pyramids, projected and sorted. spectra: (N, bins) power at each radial frequency.
    """

    features: Features
    pixels: np.ndarray
    patches: list[np.ndarray]
    spectra: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """The figures of a network's images: of each block by name, and the spectrum of all in dB."""

    blocks: list[dict[str, Any]]
    spectrum: list[float]

    def figure(self, key: str) -> Any:
        """A figure: a number of one block, {"mean", "std"} of several, None where a block has
        none; for `classes` the mean shares."""
        values = [block[key] for block in self.blocks]
        if any(value is None for value in values):
            return None
        if key == "classes":
            return np.mean(values, axis=0).tolist()
        if len(values) == 1:
            return values[0]
        return {"mean": statistics.fmean(values), "std": statistics.stdev(values)}


def measure(net: FeatureNet, images: Images) -> Measures:
    """Look at images once, for all figures."""
    pixels, patches, spectra = [], [], []
    along: np.ndarray | None = None
    for start in range(0, len(images), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(images)))
        x = rows_of(images, rows).cpu()
        values = x.flatten(1).double().numpy()
        if along is None:
            along = directions(values.shape[1], PROJECTIONS, np.float64)
        pixels.append(values @ along)
        patches.append(band_patches(x, seed=start))
        spectra.append(power_spectra(x))
    bands = [np.concatenate(band) for band in zip(*patches, strict=True)]
    return Measures(
        extract(net, images),
        np.sort(np.concatenate(pixels), axis=0),
        [projected(band, DIRECTIONS) for band in bands],
        np.concatenate(spectra),
    )


def compare(reference: Measures, block: Measures) -> dict[str, Any]:
    """All figures of a block of images, ready for JSON; the keys are FIGURES.

    `classes` are the shares of the classes, None where the features know none.
    """
    real, fake = reference.features, block.features
    precision, recall = precision_recall(real.values, fake.values)
    shares = class_shares(fake)
    scale = _scale(real.texture)
    return {
        "fd": frechet_distance(real.values, fake.values),
        "kid": kernel_distance(real.values, fake.values),
        "precision": precision,
        "recall": recall,
        "swd": wasserstein(reference.pixels, block.pixels),
        "texture_fd": frechet_distance(real.texture / scale, fake.texture / scale),
        "texture_swd": texture_distance(reference.patches, block.patches),
        "spectrum": spectrum_distance(reference.spectra, block.spectra),
        "classes": None if shares is None else shares.tolist(),
    }


def _scale(texture: np.ndarray) -> np.ndarray:
    """The reference's deviation of every texture feature; 1 for one that is the same everywhere."""
    deviation = texture.std(axis=0)
    return np.where(deviation > 1e-6, deviation, 1.0)


def evaluation_of(reference: Measures, blocks: Iterable[Measures]) -> Evaluation:
    """The figures of blocks, measured one after another; at least one."""
    figures, power, count = [], np.zeros(reference.spectra.shape[1]), 0
    for block in blocks:
        figures.append(compare(reference, block))
        power += block.spectra.sum(axis=0)
        count += len(block.spectra)
    return Evaluation(figures, decibels(power / count).tolist())
