"""The pixels of a set: an array in memory, or rows of files that are memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advkd.files import CheckpointError, read_json, write_json

_AT_ONCE = 1 << 24  # bytes that are hashed at once


class Mapped:
    """Images (N, C, S, S) that lie in files and are read when they are asked for.

    It stands where an array would: it has `shape`, `dtype` and a length, and `[rows]`, a slice or
    whole numbers, gives a copy of these images in memory.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        rows: np.ndarray | None = None,
        notes: Path | None = None,
    ):
        """parts: memory-mapped (n, C, S, S), all of one length but the last.
        rows: which images of the parts these are, in order; None for all of them.
        notes: how the names of files begin in which identities of these parts are remembered."""
        self._parts, self._each, self._notes = parts, len(parts[0]), notes
        self._rows = np.arange(sum(map(len, parts))) if rows is None else rows
        self.dtype: np.dtype = parts[0].dtype
        self.shape: tuple[int, ...] = (len(self._rows), *parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = self._rows[rows]
        images = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for image, row in zip(images, chosen.tolist(), strict=True):
            image[:] = self._parts[row // self._each][row % self._each]
        return images

    def subset(self, rows: Sequence[int] | np.ndarray) -> Mapped:
        """The images `rows`, in that order; nothing is read."""
        return Mapped(self._parts, self._rows[np.asarray(rows, np.int64)], self._notes)

    def remembered(self) -> Path | None:
        """The file where the identity of these rows is remembered, if it may be."""
        if self._notes is None:
            return None
        which = hashlib.sha256(self._rows.astype("<i8").data).hexdigest()
        return self._notes.with_name(f"{self._notes.name}-{which[:16]}.json")


Pixels = np.ndarray | Mapped


def identity(pixels: Pixels) -> str:
    """SHA-256 over shape, dtype and values, however the pixels are held."""
    file = pixels.remembered() if isinstance(pixels, Mapped) else None
    if file is not None and file.is_file():
        with contextlib.suppress(CheckpointError):
            known = read_json(file).get("sha256")
            if isinstance(known, str):
                return known
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
    step = max(1, _AT_ONCE // max(1, math.prod(pixels.shape[1:]) * pixels.dtype.itemsize))
    for start in range(0, len(pixels), step):
        digest.update(np.ascontiguousarray(pixels[start : start + step]).data)
    if file is not None:
        with contextlib.suppress(OSError):  # it only saves time
            write_json(file, {"sha256": digest.hexdigest()})
    return digest.hexdigest()
