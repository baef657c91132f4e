"""NumPy's `.npy` and `.npz` files, read with nothing evaluated and nothing unpickled.

An array's header is a small Python dictionary. Three patterns read the only form that numpy.save
gives it, and the shape is compared with the bytes that are there before any memory is taken.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from advkd.data.bounds import check_unpacked
from advkd.data.geometry import conform, resize_notes
from advkd.data.labels import checked_labels
from advkd.data.source import DataError, Source, brief

_IMAGES = ("images", "x", "x_train", "train_images", "arr_0")
_LABELS = ("labels", "y", "y_train", "train_labels", "arr_1")
_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 1 << 16  # bytes; the numbers of an array without fields take about a hundred
_DESCR = re.compile(r"'descr':\s*'([^']{1,16})'")
_ORDER = re.compile(r"'fortran_order':\s*(True|False)")
_SHAPE = re.compile(r"'shape':\s*\(([\dL,\s]*)\)")
_SIDE = re.compile(r"\d{1,18}L?")  # Python 2 wrote the L
_DTYPE = re.compile(r"[<>|=]?[a-zA-Z]\d{0,3}")
_NOT_PLAIN = "its header is not that of a plain array"
_PIECE = 1 << 24  # bytes that are unpacked at once


class Header(NamedTuple):
    """An array's dtype, shape and order of axes, as its file says."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> Header:
    """Read an array's header; ValueError for one that is not of a plain array of numbers."""
    magic = file.read(8)
    if magic[:6] != _MAGIC or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise ValueError("it does not begin as numpy.save writes")
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes")
    text = file.read(length).decode("latin-1")
    descr, order, shape = (pattern.search(text) for pattern in (_DESCR, _ORDER, _SHAPE))
    if descr is None or order is None or shape is None:
        raise ValueError(_NOT_PLAIN)
    for match in (descr, order, shape):
        text = text.replace(match[0], "", 1)
    sides = [side.strip() for side in shape[1].split(",") if side.strip()]
    known = _DTYPE.fullmatch(descr[1]) and all(map(_SIDE.fullmatch, sides))
    if not known or text.strip("{} ,\n"):
        raise ValueError(_NOT_PLAIN)
    dtype = np.dtype(descr[1])
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return Header(dtype, tuple(int(side.rstrip("L")) for side in sides), order[1] == "True")


def read_array(file: BinaryIO, header: Header, exact: bool) -> np.ndarray:
    """Read the array that follows a header; ValueError where there are too few bytes.

    exact: True also refuses bytes behind it, and so reads to the end, where archives have their
        checksum.
    """
    array = np.empty(math.prod(header.shape), header.dtype)
    view = array.view(np.uint8).data
    done = 0
    while done < len(view):
        piece = file.read(min(_PIECE, len(view) - done))
        if not piece:
            raise ValueError(f"it ends after {done:,} of {len(view):,} bytes")
        view[done : done + len(piece)] = piece
        done += len(piece)
    if exact and file.read(1):
        raise ValueError(f"it holds more than the {len(view):,} bytes that its header asks for")
    return array.reshape(header.shape, order="F" if header.fortran else "C")


class _File:
    """The arrays of a `.npy` (one, of no name) or `.npz` file; every failure is a DataError."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            self.is_archive = file.read(len(_MAGIC)) != _MAGIC

    def headers(self) -> dict[str, Header | str]:
        """Headers by the arrays' names; for one that cannot be read, why."""
        try:
            if not self.is_archive:
                with self.path.open("rb") as file:
                    return {"": read_header(file)}
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                return {name[:-4]: _header_or_reason(archive, name) for name in names}
        except Exception as error:  # zipfile raises whatever an archive makes it
            raise self.unreadable(error) from error

    def check_size(self, header: Header) -> None:
        """Raise DataError, before memory is taken, for an array larger than its file allows."""
        size = self.path.stat().st_size
        if self.is_archive:
            check_unpacked(self.path, header.nbytes)
        elif size < header.nbytes:
            raise self.unreadable(f"it asks for {header.nbytes:,} bytes and has {size:,}")

    def read(self, name: str, header: Header) -> np.ndarray:
        """The array `name`, whose header has been read."""
        self.check_size(header)
        try:
            if not self.is_archive:
                with self.path.open("rb") as file:
                    read_header(file)
                    return read_array(file, header, exact=False)
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                read_header(member)  # type: ignore[arg-type]
                return read_array(member, header, exact=True)  # type: ignore[arg-type]
        except Exception as error:  # as above
            raise self.unreadable(error) from error

    def unreadable(self, reason: object) -> DataError:
        words = brief(str(reason)) or type(reason).__name__
        return DataError(f"{self.path} is not a readable array: {words}")


def _header_or_reason(archive: zipfile.ZipFile, name: str) -> Header | str:
    try:
        with archive.open(name) as member:
            return read_header(member)  # type: ignore[arg-type]
    except Exception as error:  # as above; other arrays of the archive may still be read
        return str(error) or type(error).__name__


def _layout(shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    """(N, C, H, W) of an array of images of this shape; None where it is no such shape."""
    match tuple(shape):
        case (n, h, w):
            return n, 1, h, w
        case (n, (1 | 3) as c, h, w) | (n, h, w, (1 | 3) as c):
            return n, c, h, w
    return None


@dataclass(frozen=True)
class ArraySource(Source):
    """An array of images in a `.npy` or `.npz` file."""

    name: str = ""
    header: Header | None = None

    def pixels(self) -> np.ndarray:
        assert self.header is not None
        array = _File(self.path).read(self.name, self.header)
        layout = _layout(array.shape)
        assert layout is not None
        if array.shape[1:] != layout[1:] and array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        pixels = _as_pixels(array.reshape(layout), self.path)
        return conform(pixels, self.size, self.channels, self.crop)


def open_array(path: Path, size: int | None, channels: int | None, crop: bool) -> ArraySource:
    """Read the headers of a `.npy` or `.npz` file, and the labels, if it holds any.

    DataError where it does not hold images: uint8 or floats of a shape (N, H, W), (N, C, H, W) or
    (N, H, W, C) with C = 1 or 3.
    """
    file = _File(path)
    headers = file.headers()
    name = _images_name(headers, path)
    header = headers[name]
    if isinstance(header, str):
        raise file.unreadable(header)
    layout = _layout(header.shape)
    if layout is None:
        raise DataError(
            f"{path} has shape {header.shape} instead of (N, H, W), (N, C, H, W) or (N, H, W, C) "
            f"with C = 1 or 3"
        )
    if 0 in layout:
        raise DataError(f"{path} holds no images: its shape is {header.shape}")
    if header.dtype != np.uint8 and header.dtype.kind != "f":
        raise DataError(f"{path} holds {header.dtype} where uint8 or floats are needed")
    file.check_size(header)
    others = {other: headers[other] for other in headers if other != name}
    labels_name, labels = _labels(file, others, layout[0])
    passed = brief(", ".join(sorted(set(others) - {labels_name})))
    chosen = size or min(layout[2:])
    notes = [f"arrays passed over: {passed}"] if passed else []
    return ArraySource(
        path=path,
        count=layout[0],
        size=chosen,
        channels=channels or layout[1],
        crop=crop,
        labels=labels,
        notes=(*notes, *resize_notes([(layout[3], layout[2])], chosen, crop)),
        name=name,
        header=header,
    )


def _images_name(headers: Mapping[str, Header | str], path: Path) -> str:
    """The array of images: one of the known names, or the only one that can be images."""
    known = next((name for name in _IMAGES if name in headers), None)
    if known is not None:
        return known
    others = [name for name in headers if name not in _LABELS]
    if len(others) > 1:
        shapes = {n: h.shape for n, h in headers.items() if isinstance(h, Header)}
        others = [name for name in others if _layout(shapes.get(name, ()))]
    if len(others) != 1:
        names = brief(", ".join(sorted(headers))) or "none"
        raise DataError(f"{path} does not say which array is the images (found: {names})")
    return others[0]


def _labels(
    file: _File, headers: Mapping[str, Header | str], count: int
) -> tuple[str, np.ndarray | None]:
    """Name and values of the array of labels, if there is one."""
    for name in _LABELS:
        header = headers.get(name)
        # An array that is only numbered is taken for labels where it can be that.
        if isinstance(header, str) and name != "arr_1":
            raise file.unreadable(header)
        if isinstance(header, Header) and (
            name != "arr_1" or header.shape in ((count,), (count, 1))
        ):
            return name, checked_labels(file.read(name, header), count, file.path)
    return "", None


def _as_pixels(array: np.ndarray, path: Path) -> np.ndarray:
    """Arrays (N, C, H, W) of bytes as they are, of floats as float32 in [-1, 1]."""
    if array.dtype == np.uint8:
        return array
    bad = ~np.isfinite(array).all(axis=(1, 2, 3))
    if bad.any():
        raise DataError(f"{path} holds NaN or infinity, first in image {int(bad.argmax())}")
    low, high = float(array.min()), float(array.max())
    if low < -1 or high > 1:
        raise DataError(f"{path} holds floats in [{low:g}, {high:g}] instead of [-1, 1] or [0, 1]")
    pixels = array.astype(np.float32)
    if low >= 0:
        pixels *= np.float32(2)
        pixels -= np.float32(1)
    return pixels
