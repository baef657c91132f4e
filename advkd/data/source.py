"""What every reader of images gives: a `Source`, known from headers, and the `ImageSet` it loads.

What cannot be read is a `DataError`, one sentence that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MAX_NAMED = 200  # classes that `describe` lists one by one


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    pixels: (N, C, H, W), uint8 in [0, 255] or float32 in [-1, 1].
    labels: (N,) int64 class indices from 0 up, or None.
    source: where the images come from, for people to read.
    classes: the classes' names, label 0 first, or None where they have none.
    notes: lines for people on how the source was read and what of it was passed over.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    source: str
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def size(self) -> int:
        """Height = width of the images, in pixels."""
        return int(self.pixels.shape[2])

    @property
    def num_classes(self) -> int | None:
        """The number of named classes, or one more than the largest label; None without labels."""
        return _num_classes(self.labels, self.classes)

    def subset(self, rows: Sequence[int] | np.ndarray) -> ImageSet:
        """The images `rows`, in that order, with their labels and the classes' names."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageSet(self.pixels[rows], labels, self.source, self.classes, self.notes)

    def batch(
        self, indices: Sequence[int] | np.ndarray, flip: np.ndarray | None = None
    ) -> torch.Tensor:
        """Images `indices` as float32 (B, C, H, W) in [-1, 1]; bytes v become v / 127.5 - 1.

        flip: (B,) bool, True mirrors that image left to right.
        """
        chosen = self.pixels[np.asarray(indices, dtype=np.int64)]
        if flip is not None:
            mask = np.asarray(flip, dtype=bool)
            chosen[mask] = chosen[mask, :, :, ::-1]
        if chosen.dtype == np.uint8:
            chosen = chosen.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return torch.from_numpy(np.ascontiguousarray(chosen))


@dataclass(frozen=True)
class Source:
    """Images that are not read yet: what a file's or a folder's headers say of them.

    count, size, channels: the shape (count, channels, size, size) of what `load` will give.
    labels, classes, notes: as in `ImageSet`.
    crop: whether images that are not square are cut to a square, or squeezed.
    title: what people call the images; the path where it is empty.
    """

    path: Path
    count: int
    size: int
    channels: int
    crop: bool
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    title: str = ""

    def __len__(self) -> int:
        return self.count

    @property
    def source(self) -> str:
        """Where the images come from, for people to read."""
        return self.title or str(self.path)

    @property
    def num_classes(self) -> int | None:
        """As `ImageSet.num_classes`."""
        return _num_classes(self.labels, self.classes)

    def pixels(self) -> np.ndarray:
        """Read the images: (N, C, H, W), uint8 in [0, 255] or float32 in [-1, 1]."""
        raise NotImplementedError

    def load(self) -> ImageSet:
        """Read the images into memory; DataError for one that is broken, or for too many."""
        needed, memory = self.count * self.channels * self.size**2, physical_memory()
        if needed > memory:
            raise DataError(
                f"{self.path} holds {self.count:,} images, which take {needed / 1e9:,.1f} GB at "
                f"{self.size}x{self.size} with {self.channels} channels, more than this machine's "
                f"memory of {memory / 1e9:,.1f} GB"
            )
        return ImageSet(self.pixels(), self.labels, self.source, self.classes, self.notes)


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _num_classes(labels: np.ndarray | None, classes: tuple[str, ...] | None) -> int | None:
    if labels is None:
        return None
    return int(labels.max()) + 1 if classes is None else len(classes)


def describe(images: ImageSet | Source) -> list[str]:
    """Lines for people: the images, every class with its number of images, and the notes."""
    count = plural(len(images), f"{'grayscale' if images.channels == 1 else 'RGB'} image")
    first = f"{images.source}: {count} of {images.size}x{images.size} pixels"
    return [first, _class_line(images), *images.notes]


def plural(count: int, noun: str) -> str:
    """A count and its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _class_line(images: ImageSet | Source) -> str:
    if images.labels is None or images.num_classes is None:
        return "no classes"
    counts = np.bincount(images.labels, minlength=images.num_classes)
    names = images.classes or tuple(str(label) for label in range(len(counts)))
    named = [f"{brief(name, 60)} ({n:,})" for name, n in zip(names, counts, strict=True)]
    rest = counts[MAX_NAMED:]
    if len(rest):
        more = f"and {len(rest):,} more ({rest.min():,} to {rest.max():,} images each)"
        named = [*named[:MAX_NAMED], more]
    return f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}: {', '.join(named)}"


def brief(text: str, most: int = 300) -> str:
    """A text that a file provides, on one line and cut where it is longer than people read."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= most else f"{line[:most]}..."
