"""IDX files, the format of MNIST: a magic number, the shape, and unsigned bytes; often gzipped.

An IDX file is recognized by its first four bytes, never by its name.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from advkd.data.bounds import check_unpacked
from advkd.data.geometry import conform, resize_notes
from advkd.data.labels import checked_labels
from advkd.data.picture import suffixes
from advkd.data.source import DataError, Source

_UBYTE = 0x08  # the header's code for unsigned bytes, the only one that MNIST-like sets use
_TYPES = (_UBYTE, 0x09, 0x0B, 0x0C, 0x0D, 0x0E)
_GZIP = b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    """A file as its content, gzipped or not."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
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


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes that follow the header; DataError unless they are as many as the shape asks for."""
    expected = math.prod(shape)
    try:
        with _open(path) as file:
            file.read(4 + 4 * len(shape))
            content = file.read(expected + 1)  # to the end, where gzip has its checksum
    except Exception as error:  # as above
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) != expected:
        held = "more" if len(content) > expected else f"{len(content):,}"
        raise DataError(f"{path} holds {held} bytes where its header asks for {expected:,}")
    return np.frombuffer(content, np.uint8).reshape(shape)


@dataclass(frozen=True)
class IdxSource(Source):
    """An IDX file of images."""

    shape: tuple[int, ...] = ()

    def pixels(self) -> np.ndarray:
        images = _read(self.path, self.shape)[:, None]
        return conform(images, self.size, self.channels, self.crop)


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
        shape=shape,
    )


def _labels_beside(path: Path, count: int) -> np.ndarray | None:
    """Labels of the file named as this one but for `labels` and `idx1`, gzipped or not."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    for beside in (path.with_name(plain), path.with_name(f"{plain}.gz")):
        if beside != path and beside.is_file():
            return checked_labels(_read(beside, _read_shape(beside, 1)), count, beside)
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
