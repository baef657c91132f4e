"""How far apart images of one label are, and a loss where a student's are closer.

An adversary alone is content with one good image of each label; the noise is then ignored. Two
images that grow from two noises of a label are held apart instead (Mao et al. 2019, mode-seeking
GANs; Yang et al. 2019, diversity-sensitive conditional GANs), up to the distance at which the
data's own images lie from each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories

_LOOKED_AT = 2000  # images from which the distances are taken


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference of images (B, C, S, S), pair by pair: (B,)."""
    return (a - b).abs().mean(dim=(1, 2, 3))


def missing_distance(a: Tensor, b: Tensor, typical: Tensor) -> Tensor:
    """By how much images are closer to each other than is `typical` (B,), pair by pair: (B,)."""
    return (typical - mean_distance(a, b)).clamp_min(0)


def typical_distances(x: Tensor, y: Tensor | None, num_classes: int | None) -> Tensor:
    """The mean distance of two images of each label: (num_classes,), or (1,) without labels.

    x (N, C, S, S), y (N,) int64. Each image is compared with the next of its label, so neighbors
    should have nothing to do with each other. A label of fewer than 2 images, and all where none
    has more, gets the mean over neighbors of any label.
    """
    any_label = mean_distance(x[1:], x[:-1]).mean() if len(x) > 1 else x.new_zeros(())
    found = []
    for label in range(num_classes or 1):
        own = x if y is None else x[y == label]
        found.append(mean_distance(own[1:], own[:-1]).mean() if len(own) > 1 else any_label)
    return torch.stack(found)


def typical_of_data(
    images: ImageSet | None, trajectories: Trajectories, generator: torch.Generator
) -> Tensor:
    """The typical distances of training images, or of what trajectories end in: see above."""
    num_classes = trajectories.index.num_classes
    of = trajectories.num if images is None else len(images)
    rows = torch.randperm(of, generator=generator)[:_LOOKED_AT]
    if images is None:
        parts = [trajectories.targets(part, -1).float() for part in rows.split(50)]
        return typical_distances(torch.cat(parts), trajectories.labels(rows), num_classes)
    y = None
    if num_classes is not None and images.labels is not None:
        y = torch.as_tensor(images.labels[rows.numpy()])
    return typical_distances(images.batch(rows.numpy()), y, num_classes)
