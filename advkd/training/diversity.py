"""How far apart images of one label are, and a loss where a student's are closer.

An adversary alone is content with one good image of each label; the noise is then ignored. Two
images that grow from two noises of a label are held apart instead (Mao et al. 2019, mode-seeking
GANs; Yang et al. 2019, diversity-sensitive conditional GANs), up to the distance at which the
data's own images lie from each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories

_LOOKED_AT = 2000  # images from which the distances are taken
_AT_ONCE = 50  # of them that are in memory


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference of images (B, C, S, S), pair by pair: (B,)."""
    return (a - b).abs().mean(dim=(1, 2, 3))


def missing_distance(a: Tensor, b: Tensor, typical: Tensor) -> Tensor:
    """By how much images are closer to each other than is `typical` (B,), pair by pair: (B,)."""
    return (typical - mean_distance(a, b)).clamp_min(0)


def typical_distances(
    images_of: Callable[[Tensor], Tensor], rows: Tensor, y: Tensor | None, num_classes: int | None
) -> Tensor:
    """The mean distance of two images of each label: (num_classes,), or (1,) without labels.

    rows (N,) and their labels y (N,) int64; `images_of` some of the rows gives these images
    (B, C, S, S). Each image is compared with the next of its label, so neighbors should have
    nothing to do with each other. A label of fewer than 2 images, and all where none has more, gets
    the mean over neighbors of any label.
    """
    own = [rows if y is None else rows[y == label] for label in range(num_classes or 1)]
    found = [_neighbor_distance(images_of, some) for some in own]
    any_label = None
    if any(mean is None for mean in found):
        any_label = _neighbor_distance(images_of, rows)
    if any_label is None:
        any_label = torch.zeros((), device="cpu")
    return torch.stack([any_label if mean is None else mean for mean in found])


def _neighbor_distance(images_of: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor | None:
    """The mean distance of each of these images to the next; None for fewer than 2 images."""
    pairs = len(rows) - 1
    if pairs < 1:
        return None
    # Parts of like size have the bits of all at once; a lone pair of large images would not.
    found = []
    for part in torch.arange(pairs, device="cpu").tensor_split(-(-pairs // _AT_ONCE)):
        x = images_of(rows[part[0] : part[-1] + 2])
        found.append(mean_distance(x[1:], x[:-1]))
    return torch.cat(found).mean()


def typical_of_data(
    images: ImageSet | None, trajectories: Trajectories, generator: torch.Generator
) -> Tensor:
    """The typical distances of training images, or of what trajectories end in: see above."""
    num_classes = trajectories.index.num_classes
    of = trajectories.num if images is None else len(images)
    rows = torch.randperm(of, generator=generator)[:_LOOKED_AT]
    if images is None:
        return typical_distances(
            lambda some: trajectories.targets(some, -1).float(),
            rows,
            trajectories.labels(rows),
            num_classes,
        )
    y = None
    if num_classes is not None and images.labels is not None:
        y = torch.as_tensor(images.labels[rows.numpy()])
    return typical_distances(lambda some: images.batch(some.numpy()), rows, y, num_classes)
