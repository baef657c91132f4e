"""Images to train on, and images held out to evaluate by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from advkd.data.clusters import clustered, fit_clusters
from advkd.data.images import probe
from advkd.data.registry import Dataset, find
from advkd.data.sentences import DataError
from advkd.data.source import ImageSet

MIN_IMAGES = 30  # a fifth is held out, and 5 nearest neighbors need 6 images
MAX_HELD_OUT = 2000


@dataclass(frozen=True)
class RealImages:
    """The images of a run: to train on, and held out to evaluate by."""

    train: ImageSet
    held_out: ImageSet


def real_images(source: str | Dataset, size: int, channels: int, crop: bool) -> RealImages:
    """The images of a path, or of a data set or its name.

    A data set's own test images are held out, else a part of the others. Raises DataError for what
    cannot be read.
    """
    found = source if isinstance(source, Dataset) else find(source)
    if found is None:
        return hold_out(probe(str(source), size=size, channels=channels, crop=crop).load())
    train = found.open("train", size=size, channels=channels, crop=crop).load()
    if not found.splits.test:
        return hold_out(train)
    test = found.open("test", size=size, channels=channels, crop=crop).load()
    return RealImages(train, test)


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
    return RealImages(images.subset(order[count:]), images.subset(order[:count]))


def with_clusters(images: RealImages, num: int) -> RealImages:
    """The images with `num` clusters, found among those to train on, in the place of classes.

    Raises DataError for a number that cannot be.
    """
    clusters = fit_clusters(images.train, num)
    return RealImages(clustered(images.train, clusters), clustered(images.held_out, clusters))
