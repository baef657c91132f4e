"""Clusters of images, to take the place of classes where there are none.

A teacher and a student that are told which kind of image is wanted each have an easier task, and a
discriminator that compares images of one kind with one another leaves a student less room to drop
the rare ones (Liu et al. 2020, self-conditioned GANs; Hu et al. 2023, self-guided diffusion). The
clusters are the leaves of a tree that halves the images at the median along their principal
direction, again and again (Boley 1998, principal direction divisive partitioning): each holds as
many images as any other, so labels drawn uniformly, as classes are, give the shares that the data
have. A tree of very many images is fitted to some of them, and that holds nearly.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from advkd.data.sentences import DataError
from advkd.data.source import ImageSet

SIDE = 7  # pixels that a side is averaged down to before images are compared
MAX_POINTS = 1 << 27  # bytes of small images that are compared at once: of more, a random part
_AT_ONCE = 1000  # images made small at once, and fewer where they are large
_VALUES = 1 << 24  # of the images made small at once


class Clusters:
    """A tree that gives every image one of `num` labels.

    `directions` (num - 1, C SIDE^2) and `thresholds` (num - 1,), float64, are those of its inner
    nodes, in images of C channels averaged down to SIDE; the two below node i are 2i + 1, 2i + 2.
    """

    def __init__(self, directions: np.ndarray, thresholds: np.ndarray):
        self.directions, self.thresholds = directions, thresholds

    def labels(self, images: ImageSet) -> np.ndarray:
        """The cluster of each image, (N,) int64."""
        parts = np.array_split(np.arange(len(images)), -(-len(images) // _most(images)))
        return np.concatenate([self._labels(_points(images, rows)) for rows in parts])

    def _labels(self, points: np.ndarray) -> np.ndarray:
        beyond = points @ self.directions.T > self.thresholds
        inner, every = len(self.thresholds), np.arange(len(points))
        node = np.zeros(len(points), dtype=np.int64)
        for _ in range((inner + 1).bit_length() - 1):
            node = 2 * node + 1 + beyond[every, node]
        return node - inner


def fit_clusters(images: ImageSet, num: int) -> Clusters:
    """The tree of `num` clusters of images; DataError where `num` is no power of 2 from 2 up, or
    there are fewer images."""
    if num < 2 or num & (num - 1):
        raise DataError(f"data.clusters={num} is not a power of 2 from 2 up")
    if num > len(images):
        raise DataError(f"{images.source} has {len(images):,} images for data.clusters={num}")
    rows, most = np.arange(len(images)), max(num, _most(images))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))
    points = _points(images, rows)
    directions = np.empty((num - 1, points.shape[1]))
    thresholds = np.empty(num - 1)
    members = {0: points}
    for node in range(num - 1):
        here = members.pop(node)
        directions[node] = _principal_direction(here)
        along = here @ directions[node]
        thresholds[node] = np.median(along) if len(along) else 0.0
        beyond = along > thresholds[node]
        members[2 * node + 1], members[2 * node + 2] = here[~beyond], here[beyond]
    return Clusters(directions, thresholds)


def clustered(images: ImageSet, clusters: Clusters) -> ImageSet:
    """The images with their clusters for labels, and without names of classes."""
    num = len(clusters.thresholds) + 1
    note = f"{num} clusters of like images in the place of classes"
    labels = clusters.labels(images)
    return replace(images, labels=labels, classes=None, notes=(*images.notes, note))


def _most(images: ImageSet) -> int:
    """How many of these images are looked at together."""
    return max(1, MAX_POINTS // (8 * images.channels * SIDE**2))


def _points(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """The images `rows` averaged down to SIDE, (N, C SIDE^2) float64."""
    step = max(1, min(_AT_ONCE, _VALUES // (images.channels * images.size**2)))
    parts = np.array_split(rows, -(-len(rows) // step))
    small = [F.adaptive_avg_pool2d(images.batch(part), SIDE).flatten(1) for part in parts]
    return torch.cat(small).double().numpy()


def _principal_direction(points: np.ndarray) -> np.ndarray:
    """The direction (D,) in which points (N, D) vary most, its largest entry positive; the first
    axis where they do not vary."""
    if len(points) < 2:
        return np.eye(points.shape[1])[0]
    _, vectors = np.linalg.eigh(np.cov(points.T))
    found: np.ndarray = vectors[:, -1]
    return found * np.sign(found[np.abs(found).argmax()])
