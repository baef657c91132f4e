"""IDX files, the format of MNIST: a magic number, the shape, and unsigned bytes; often gzipped.

An IDX file is recognized by its first four bytes, never by its name.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from advkd.data.bounds import check_unpacked
from advkd.data.cache import Read
from advkd.data.geometry import resize_notes
from advkd.data.labels import checked_labels
from advkd.data.picture import suffixes
from advkd.data.raw import RawSource, Stream, map_numbers
from advkd.data.sentences import DataError

_UBYTE = 0x08  # the header's code for unsigned bytes, the only one that MNIST-like sets use
_TYPES = (_UBYTE, 0x09, 0x0B, 0x0C, 0x0D, 0x0E)
_GZIP = b"\x1f\x8b"
_START = 16  # bytes before the first image


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def _open(path: Path) -> BinaryIO:
    """A file as its content, gzipped or not."""
    packed = _is_packed(path)
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def idx_axes(path: Path) -> int | None:
    """The number of axes of an IDX file, gzipped or not; None for any other file."""
    magic = b""
    with contextlib.suppress(Exception), _open(path) as file:  # what cannot be read is no IDX file
        magic = file.read(4)
    is_idx = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _TYPES and 1 <= magic[3] <= 4
    return magic[3] if is_idx else None


def _read_shape(path: Path, ndim: int) -> tuple[int, ...]:
    """The shape of an IDX file of unsigned bytes, from its header and bounded by its size."""
    try:
        with _open(path) as file:
            header = file.read(4 + 4 * ndim)
    except Exception as error:  # gzip raises OSError, EOFError, zlib.error, struct.error
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(header) < 4 + 4 * ndim or header[:4] != bytes([0, 0, _UBYTE, ndim]):
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {ndim} axes")
    shape = struct.unpack_from(f">{ndim}I", header, 4)
    check_unpacked(path, math.prod(shape))
    return shape


def _read_labels(path: Path) -> np.ndarray:
    """The labels of a file; DataError unless they are as many as its header says."""
    (count,) = _read_shape(path, 1)
    try:
        with _open(path) as file:
            file.read(8)
            content = file.read(count + 1)  # to the end, where gzip has its checksum
    except Exception as error:  # as above
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) != count:
        raise DataError(_count_differs(path, count, len(content)))
    return np.frombuffer(content, np.uint8)


def _count_differs(path: Path, expected: int, held: int) -> str:
    words = "more" if held > expected else f"{held:,}"
    return f"{path} holds {words} bytes where its header asks for {expected:,}"


@dataclass(frozen=True)
class IdxSource(RawSource):
    """An IDX file of images."""

    raw: tuple[int, int] = (0, 0)  # (H, W) as they are stored

    @property
    def raw_shape(self) -> tuple[int, int, int]:
        return 1, *self.raw

    def in_place(self) -> np.ndarray | None:
        is_plain = self.raw_shape == self.shape[1:] and not _is_packed(self.path)
        return self._mapped() if is_plain else None

    def _mapped(self) -> np.ndarray:
        shape = (self.count, *self.raw_shape)
        held = self.path.stat().st_size - _START
        if held != math.prod(shape):
            raise DataError(_count_differs(self.path, math.prod(shape), held))
        return map_numbers(self.path, _START, self.dtype, shape)

    @contextlib.contextmanager
    def rows(self) -> Iterator[Read]:
        if not _is_packed(self.path):
            array = self._mapped()
            yield lambda start, stop: array[start:stop]
            return
        stream = Stream(self._begin, self.dtype, (self.count, *self.raw_shape))
        with contextlib.closing(stream):

            def read(start: int, stop: int) -> np.ndarray:
                try:
                    return stream.rows(start, stop)
                except Exception as error:  # gzip raises OSError, EOFError, zlib.error
                    raise DataError(f"{self.path} cannot be read: {error}") from error

            yield read

    def _begin(self) -> BinaryIO:
        file = _open(self.path)
        file.read(_START)
        return file


def open_idx(path: Path, size: int | None, channels: int | None, crop: bool) -> IdxSource:
    """Read the header of an IDX file of images, and the labels of the file beside it, if any."""
    shape = _read_shape(path, 3)
    if 0 in shape:
        raise DataError(f"{path} holds no images: its shape is {shape}")
    chosen = size or min(shape[1:])
    return IdxSource(
        path=path,
        count=shape[0],
        size=chosen,
        channels=channels or 1,
        crop=crop,
        labels=_labels_beside(path, shape[0]),
        notes=tuple(resize_notes([(shape[2], shape[1])], chosen, crop)),
        raw=(shape[1], shape[2]),
    )


def _labels_beside(path: Path, count: int) -> np.ndarray | None:
    """Labels of the file named as this one but for `labels` and `idx1`, gzipped or not."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    if name == path.name:  # what lies beside it is the same images
        return None
    for beside in (path.with_name(plain), path.with_name(f"{plain}.gz")):
        if beside.is_file():
            return checked_labels(_read_labels(beside), count, beside)
    return None


def idx_of_folder(folder: Path, by_name: bool) -> tuple[Path, int] | None:
    """The IDX file of images that a folder stands for, and how many other files lie beside it.

    None where it has none. Of several, the one whose name begins with `train`; DataError where
    that does not single one out. With `by_name`, a file that is named as IDX files are is one too,
    so that a broken one is named where there is nothing else.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if os.path.isfile(entry))
    others = [name for name in names if os.path.splitext(name)[1].lower() not in suffixes()]
    files = [folder / name for name in others if idx_axes(folder / name) == 3]
    if by_name and not files:
        files = [folder / name for name in others if "idx3" in name]
    chosen = [file for file in files if file.name.lower().startswith("train")] or files
    if len(chosen) > 1:
        raise DataError(f"{folder} holds {chosen[0].name} and {chosen[1].name}; name one of them")
    return (chosen[0], len(names) - 1) if chosen else None
