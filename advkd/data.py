"""Images to train and judge on: the data that ship, folders, arrays and IDX files.

Everything is read into one `ImageSet` in memory. Reading is deterministic: files are taken in
sorted order, and the same files give the same pixels. What cannot be read is a `DataError`, one
sentence that names the file.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

_SHIPPED = Path(__file__).parent / "datasets" / "fashion-mnist"
_IDX_UBYTE = 0x08  # the IDX header's code for unsigned bytes, the only one that MNIST-like sets use


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    pixels: (N, C, H, W), uint8 in [0, 255] or float32 in [-1, 1].
    labels: (N,) int64 class indices from 0 up, or None.
    source: where the images come from, for people to read.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    source: str

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
        """One more than the largest label; None where there are no labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

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


def shipped(split: Literal["train", "test"]) -> ImageSet:
    """The part of Fashion-MNIST in this package: 28x28 greyscale, 10 classes, with labels.

    "train" has 10,000 images, 1,000 of each class; "test" has 2,000 held-out ones, 200 of each.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is neither 'train' nor 'test'")
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(_SHIPPED / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(_SHIPPED / f"{stem}-labels-idx1-ubyte.gz", 1)
    return ImageSet(images[:, None], labels.astype(np.int64), f"Fashion-MNIST ({split}, shipped)")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not: uint8 with `ndim` axes."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    header = 4 + 4 * ndim
    if len(raw) < header or raw[0] or raw[1] or raw[2] != _IDX_UBYTE or raw[3] != ndim:
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {ndim} axes.")
    shape = np.frombuffer(raw, ">u4", ndim, 4).astype(np.int64)
    expected = header + int(shape.prod())
    if len(raw) != expected:
        raise DataError(f"{path} holds {len(raw)} bytes where its header asks for {expected}.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
