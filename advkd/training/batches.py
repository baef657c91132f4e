"""The batches of a distillation: trajectories, and for a fresh adversary new noise and images.

The host draws numbers of images and reads targets (`Batches.drawn`); the device makes the batch of
them (`Batches.made`), noise included.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from advkd.config import Config, ConfigError
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories
from advkd.engine.noise import FIRST_FRESH, FIRST_OTHER
from advkd.models.layers import area_resized
from advkd.training.augment import Augmentation, draw
from advkd.training.streams import generator_at

STREAM = "distil"  # of these random numbers; its name is part of the bits


class Labeled(NamedTuple):
    """Images or noise (B, C, S, S) and their labels (B,) int64, or None."""

    x: Tensor
    y: Tensor | None

    def share(self, part: slice) -> Labeled:
        """The images of one worker."""
        return Labeled(self.x[part], None if self.y is None else self.y[part])


class Drawn(NamedTuple):
    """A batch before it is made: as `Batch`, with image numbers (B,) int64 in the place of noise
    and targets as they are stored."""

    stored: Labeled
    targets: dict[int, Tensor]
    fresh: Labeled | None
    images: Labeled | None
    of_real: Augmentation | None
    of_fake: Augmentation | None
    other: Labeled | None


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    x_T (B, C, S, S) with labels y (B,) or None, and the targets x^(k) by the head's number k
    (0 .. K-1), each at its head's resolution, of the heads that the step asks for. For a fresh
    adversary also the noise that the images shown to D grow from, and the training images that
    replace the last target as D's real ones, or None; how real and generated images of the last
    head are moved and covered before D sees them, or None; and other noise with the labels of the
    fresh one, where images of a label are held apart, or None.
    """

    x_T: Tensor
    targets: dict[int, Tensor]
    y: Tensor | None
    last: int  # the number of the last head
    fresh: Labeled | None = None
    images: Labeled | None = None
    of_real: Augmentation | None = None
    of_fake: Augmentation | None = None
    other: Labeled | None = None

    def share(self, part: slice) -> Batch:
        """The part of the batch that one worker takes."""
        x_T, y = Labeled(self.x_T, self.y).share(part)
        return Batch(
            x_T,
            {k: x[part] for k, x in self.targets.items()},
            y,
            self.last,
            self.fresh.share(part) if self.fresh else None,
            self.images.share(part) if self.images else None,
            self.of_real.share(part) if self.of_real else None,
            self.of_fake.share(part) if self.of_fake else None,
            self.other.share(part) if self.other else None,
        )

    def real(self, k: int) -> Labeled:
        """The images that D takes for real at head k (0 .. K-1)."""
        if self.images is not None and k == self.last:
            return self.images
        return Labeled(self.targets[k], self.y)

    def fake(self, image: Tensor) -> Labeled:
        """Images of the student, with the labels of the noise that they grow from."""
        return Labeled(image, self.fresh.y if self.fresh else self.y)


class Batches:
    """Makes the batch of any step of a distillation, always the same one."""

    def __init__(self, config: Config, trajectories: Trajectories, images: ImageSet | None):
        """`images` are training images that D takes for real, or None.

        Raises ConfigError where they do not fit the trajectories.
        """
        if images is not None:
            _check_images(images, trajectories)
        self.trajectories, self.images = trajectories, images
        self.size, self.seed = config.distill.batch, config.run.seed
        self.stages, self.flip = config.student.stages, config.data.flip
        self.translate, self.cutout = config.distill.translate, config.distill.cutout

    def drawn(self, step: int, heads: Collection[int], fresh: bool, other: bool) -> Drawn:
        """What the batch of `step` is made of, on the host: the targets of `heads`; `fresh` asks
        for new noise, and for images where there are any; `other` for a second noise beside it."""
        generator = generator_at(self.seed, step, STREAM)
        store = self.trajectories
        indices = torch.randint(store.num, (self.size,), generator=generator)
        images = None
        if fresh and self.images is not None:
            images = self._real_images(self.images, generator)
        of_real = self._augmentation(generator) if fresh else None
        of_fake = self._augmentation(generator) if fresh else None
        return Drawn(
            Labeled(indices, store.labels(indices)),
            {k: store.targets(indices, k) for k in heads},
            self._fresh_noise(step, images, FIRST_FRESH) if fresh else None,
            images,
            of_real,
            of_fake,
            self._fresh_noise(step, images, FIRST_OTHER) if other else None,
        )

    def made(self, drawn: Drawn) -> Batch:
        """The batch, on the device that `drawn` is on; nothing waits for it there."""
        x_T, y = self._grown(drawn.stored)
        targets = {
            k: area_resized(x.float(), self.stages[k]).contiguous(memory_format=torch.channels_last)
            for k, x in drawn.targets.items()
        }
        return Batch(
            x_T,
            targets,
            y,
            len(self.stages) - 1,
            self._grown(drawn.fresh) if drawn.fresh else None,
            drawn.images,
            drawn.of_real,
            drawn.of_fake,
            self._grown(drawn.other) if drawn.other else None,
        )

    def _grown(self, numbers: Labeled) -> Labeled:
        """Images' numbers to their noise."""
        index = self.trajectories.index
        return Labeled(index.noise.x_T(numbers.x, index.shape), numbers.y)

    def _augmentation(self, generator: torch.Generator) -> Augmentation | None:
        """How the images that D sees at the last head are moved and covered."""
        if not (self.translate or self.cutout):
            return None
        size = self.stages[-1]
        return draw(self.size, size, self.translate, self.cutout, generator)

    def _fresh_noise(self, step: int, images: Labeled | None, first: int) -> Labeled:
        """Numbers, from `first` on, of noise that no other step sees, and no store holds.

        Its labels are those of the images that D takes for real, so that a pair is of one class.
        """
        index = self.trajectories.index
        noise = index.noise  # the purpose is the same, and the image numbers are beyond any store's
        first += step * self.size
        numbers = torch.arange(first, first + self.size, device="cpu")
        y = noise.labels(numbers, index.num_classes)
        if images is not None and images.y is not None:
            y = images.y
        return Labeled(numbers, y)

    def _real_images(self, images: ImageSet, generator: torch.Generator) -> Labeled:
        """Training images, with labels where the student has them."""
        rows = torch.randint(len(images), (self.size,), generator=generator).numpy()
        mirrored = torch.rand(self.size, generator=generator).numpy() < (0.5 if self.flip else 0)
        x = images.batch(rows, mirrored).contiguous(memory_format=torch.channels_last)
        y = None
        if self.trajectories.index.num_classes is not None and images.labels is not None:
            y = torch.from_numpy(images.labels[rows])
        return Labeled(x, y)


def _check_images(images: ImageSet, trajectories: Trajectories) -> None:
    index = trajectories.index
    C, size, _ = index.shape
    if (images.channels, images.size) != (C, size):
        raise ConfigError(
            f"{images.source} has images of {images.size}x{images.size} with {images.channels} "
            f"channels, the trajectories {size}x{size} with {C}"
        )
    if index.num_classes is None:
        return
    if images.labels is None or (images.num_classes or 0) > index.num_classes:
        raise ConfigError(
            f"the student has {index.num_classes} classes, but {images.source} has no labels that "
            "fit: set distill.real_images=false"
        )
