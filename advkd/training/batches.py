"""The batches of a distillation: trajectories, and for a fresh adversary new noise and images."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    x_T (B, C, S, S) with labels y (B,) or None, and the targets x^(k), each at its head's
    resolution. For a fresh adversary also the noise that the images shown to D grow from, and the
    training images that replace the last target as D's real ones, or None; how real and generated
    images of the last head are moved and covered before D sees them, or None; and other noise with
    the labels of the fresh one, where images of a label are held apart, or None.
    """

    x_T: Tensor
    targets: list[Tensor]
    y: Tensor | None
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
            [x[part] for x in self.targets],
            y,
            self.fresh.share(part) if self.fresh else None,
            self.images.share(part) if self.images else None,
            self.of_real.share(part) if self.of_real else None,
            self.of_fake.share(part) if self.of_fake else None,
            self.other.share(part) if self.other else None,
        )

    def real(self, k: int) -> Labeled:
        """The images that D takes for real at head k (0 .. K-1)."""
        if self.images is not None and k == len(self.targets) - 1:
            return self.images
        return Labeled(self.targets[k], self.y)

    def fake(self, image: Tensor) -> Labeled:
        """Images of the student, with the labels of the noise that they grow from."""
        return Labeled(image, self.fresh.y if self.fresh else self.y)


class Batches:
    """Makes the batch of any step of a distillation, always the same one."""

    def __init__(
        self,
        config: Config,
        trajectories: Trajectories,
        images: ImageSet | None,
        device: torch.device,
    ):
        """`images` are training images that D takes for real, or None.

        Raises ConfigError where they do not fit the trajectories.
        """
        if images is not None:
            _check_images(images, trajectories)
        self.trajectories, self.images, self.device = trajectories, images, device
        self.size, self.seed = config.distill.batch, config.run.seed
        self.stages, self.flip = config.student.stages, config.data.flip
        self.translate, self.cutout = config.distill.translate, config.distill.cutout

    def at(self, step: int, fresh: bool, other: bool = False) -> Batch:
        """The batch of `step`; `fresh` asks for new noise, and for images where there are any;
        `other` for a second noise beside it."""
        generator = generator_at(self.seed, step, STREAM)
        store = self.trajectories
        indices = torch.randint(store.num, (self.size,), generator=generator)
        targets = store.targets(indices)
        y = store.labels(indices)
        images = None
        if fresh and self.images is not None:
            images = self._real_images(self.images, generator)
        of_real = self._augmentation(generator) if fresh else None
        of_fake = self._augmentation(generator) if fresh else None
        return Batch(
            store.x_T(indices).to(self.device),
            [
                area_resized(targets[:, k], size)
                .to(self.device)
                .contiguous(memory_format=torch.channels_last)
                for k, size in enumerate(self.stages)
            ],
            None if y is None else y.to(self.device),
            self._fresh_noise(step, images, FIRST_FRESH) if fresh else None,
            images,
            of_real,
            of_fake,
            self._fresh_noise(step, images, FIRST_OTHER) if other else None,
        )

    def _augmentation(self, generator: torch.Generator) -> Augmentation | None:
        """How the images that D sees at the last head are moved and covered."""
        if not (self.translate or self.cutout):
            return None
        size = self.stages[-1]
        drawn = draw(self.size, size, self.translate, self.cutout, generator)
        return drawn.to(self.device)

    def _fresh_noise(self, step: int, images: Labeled | None, first: int) -> Labeled:
        """Noise of image numbers from `first` on that no other step sees, and no store holds.

        Its labels are those of the images that D takes for real, so that a pair is of one class.
        """
        index = self.trajectories.index
        noise = index.noise  # the purpose is the same, and the image numbers are beyond any store's
        first += step * self.size
        numbers = torch.arange(first, first + self.size, device="cpu")
        y = noise.labels(numbers, index.num_classes)
        if images is not None and images.y is not None:
            y = images.y
        x_T = noise.x_T(numbers, index.shape)
        return Labeled(x_T.to(self.device), None if y is None else y.to(self.device))

    def _real_images(self, images: ImageSet, generator: torch.Generator) -> Labeled:
        """Training images, with labels where the student has them."""
        rows = torch.randint(len(images), (self.size,), generator=generator).numpy()
        mirrored = torch.rand(self.size, generator=generator).numpy() < (0.5 if self.flip else 0)
        x = images.batch(rows, mirrored).contiguous(memory_format=torch.channels_last)
        y = None
        if self.trajectories.index.num_classes is not None and images.labels is not None:
            y = torch.as_tensor(images.labels[rows], device=self.device)
        return Labeled(x.to(self.device), y)


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
