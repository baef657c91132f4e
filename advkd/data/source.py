"""What every reader of images gives: a `Source`, known from headers, and the `ImageSet` it loads.

What cannot be read is a `DataError`, one sentence that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advkd.data.cache import Layout, Read, decoded, key_of
from advkd.data.geometry import BLOCK
from advkd.data.pixels import Mapped, Pixels
from advkd.data.sentences import brief, plural

MAX_NAMED = 200  # classes that `describe` lists one by one
IN_MEMORY = 1 << 28  # bytes of a set that is held in memory; a larger one is read from files


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, or in files that are read when a batch asks for them.

    pixels: (N, C, H, W), uint8 in [0, 255] or float32 in [-1, 1].
    labels: (N,) int64 class indices from 0 up, or None.
    source: where the images come from, for people to read.
    classes: the classes' names, label 0 first, or None where they have none.
    notes: lines for people on how the source was read and what of it was passed over.
    """

    pixels: Pixels
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
        if isinstance(self.pixels, Mapped):
            pixels: Pixels = self.pixels.subset(rows)
        else:
            pixels = self.pixels[rows]
        return ImageSet(pixels, labels, self.source, self.classes, self.notes)

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

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels: uint8 or float32."""
        return np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, S, S) of the pixels."""
        return self.count, self.channels, self.size, self.size

    def reader(self) -> AbstractContextManager[Read]:
        """Reads images start .. stop, from `start` on that are multiples of 256, as uint8 in
        [0, 255] or float32 in [-1, 1]; DataError for one that is broken."""
        raise NotImplementedError

    def in_place(self) -> np.ndarray | None:
        """The pixels memory-mapped, where the file holds them as they are wanted."""
        return None

    def fingerprint(self) -> str:
        """What tells whether the files are still those that were read: sizes and times."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def load(self) -> ImageSet:
        """Read the images; DataError for one that is broken.

        Sets of more than IN_MEMORY bytes stay in their file where that holds plain pixels, and are
        decoded into the cache of memory-mapped files where it does not (`advkd.data.cache`).
        """
        return ImageSet(self._pixels(), self.labels, self.source, self.classes, self.notes)

    def _pixels(self) -> Pixels:
        if math.prod(self.shape) * self.dtype.itemsize <= IN_MEMORY:
            pixels = np.empty(self.shape, self.dtype)
            with self.reader() as read:
                for start in range(0, self.count, BLOCK):
                    stop = min(start + BLOCK, self.count)
                    pixels[start:stop] = read(start, stop)
            return pixels
        in_place = self.in_place()
        if in_place is not None:
            return Mapped([in_place])
        key = key_of(type(self).__name__, self.fingerprint(), self.shape, self.crop)
        return decoded(key, Layout(self.source, self.shape, self.dtype), self.reader)


def _num_classes(labels: np.ndarray | None, classes: tuple[str, ...] | None) -> int | None:
    if labels is None:
        return None
    return int(labels.max()) + 1 if classes is None else len(classes)


def describe(images: ImageSet | Source) -> list[str]:
    """Lines for people: the images, every class with its number of images, and the notes."""
    count = plural(len(images), f"{'grayscale' if images.channels == 1 else 'RGB'} image")
    first = f"{images.source}: {count} of {images.size}x{images.size} pixels"
    return [first, _class_line(images), *images.notes]


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
