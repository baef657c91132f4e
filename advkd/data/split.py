"""Images to train on, and images held out to evaluate by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from advkd.data.images import DataError, ImageSet

MIN_IMAGES = 30  # a fifth is held out, and 5 nearest neighbors need 6 images
MAX_HELD_OUT = 2000


@dataclass(frozen=True)
class RealImages:
    """The images of a run: to train on, and held out to evaluate by."""

    train: ImageSet
    held_out: ImageSet


def hold_out(images: ImageSet) -> RealImages:
    """Hold every fifth image (at most 2,000), always the same ones, apart from the training.

    Raises DataError for fewer than 30 images.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(
            f"{images.source} holds {len(images)} images; at least {MIN_IMAGES} are needed"
        )
    count = min(MAX_HELD_OUT, len(images) // 5)
    order = np.random.default_rng(0).permutation(len(images))
    return RealImages(_part(images, order[count:]), _part(images, order[:count]))


def _part(images: ImageSet, rows: np.ndarray) -> ImageSet:
    labels = None if images.labels is None else images.labels[rows]
    return ImageSet(images.pixels[rows], labels, images.source)
