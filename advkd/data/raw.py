"""Images that lie in a file as plain numbers, one after another: mapped, or unpacked in passing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from advkd.data.cache import Read
from advkd.data.geometry import squared, with_channels
from advkd.data.source import Source

_PIECE = 1 << 24  # bytes that are converted, resized or unpacked at once


class RawSource(Source):
    """A source whose file holds numbers and no pictures to decode."""

    @property
    def raw_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images as they are stored."""
        raise NotImplementedError

    def rows(self) -> AbstractContextManager[Read]:
        """Images start .. stop as they are stored: uint8 or float32 (n, C, H, W)."""
        raise NotImplementedError

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        step = pieces_of(self.raw_shape, self.dtype)

        def read(start: int, stop: int) -> np.ndarray:
            spans = [(first, min(first + step, stop)) for first in range(start, stop, step)]
            parts = [squared(rows(*span), self.size, self.crop) for span in spans]
            return with_channels(np.concatenate(parts), self.channels)

        with self.rows() as rows:
            yield read


def pieces_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many images of this shape are handled at once."""
    return max(1, _PIECE // max(1, math.prod(shape) * dtype.itemsize))


def map_numbers(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers that begin at a byte of a file, memory-mapped; ValueError where they are cut."""
    held, needed = path.stat().st_size - offset, math.prod(shape) * dtype.itemsize
    if held < needed:
        raise ValueError(f"it ends after {max(0, held):,} of {needed:,} bytes")
    return np.memmap(path, dtype, "r", offset, shape)


class Stream:
    """Rows of numbers in a file that can only be read forward, such as a compressed one.

    Reading on from where the last call ended unpacks nothing twice.
    """

    def __init__(self, begin: Callable[[], BinaryIO], dtype: np.dtype, shape: tuple[int, ...]):
        """begin: opens the file at its first number. shape: (N, ...) of what follows."""
        self._begin, self._dtype, self._shape = begin, dtype, shape
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file, self._at = begin(), 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop; ValueError where the file holds fewer bytes, or more behind them."""
        if start * self._row_bytes < self._at:
            self._file.close()
            self._file, self._at = self._begin(), 0
        while self._at < start * self._row_bytes:
            self._next(start * self._row_bytes - self._at)
        content = bytearray()
        while self._at < stop * self._row_bytes:
            content += self._next(stop * self._row_bytes - self._at)
        # Reading on is also what makes the decoder compare its checksum.
        if stop == self._shape[0] and self._file.read(1):
            raise ValueError(f"it holds more than the {self._at:,} bytes that its header asks for")
        return np.frombuffer(content, self._dtype).reshape(stop - start, *self._shape[1:])

    def _next(self, most: int) -> bytes:
        piece = self._file.read(min(_PIECE, most))
        if not piece:
            total = self._shape[0] * self._row_bytes
            raise ValueError(f"it ends after {self._at:,} of {total:,} bytes")
        self._at += len(piece)
        return piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()
