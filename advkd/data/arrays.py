"""NumPy's `.npy` and `.npz` files, read with nothing evaluated and nothing unpickled.

An array's header is a small Python dictionary. Three patterns read the only form that numpy.save
gives it, and the shape is compared with the bytes that are there before any memory is taken.
Images are read in parts: memory-mapped, also within an archive that does not compress them, or
unpacked from the front to the end.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from advkd.data.bounds import check_unpacked
from advkd.data.cache import Read
from advkd.data.geometry import resize_notes
from advkd.data.labels import checked_labels
from advkd.data.raw import RawSource, Stream, map_numbers, pieces_of
from advkd.data.sentences import DataError, brief
from advkd.data.source import IN_MEMORY

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


_NO_HEADER = Header(np.dtype(np.uint8), (), False)


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
        """The array `name`, whose header has been read, in memory."""
        self.check_size(header)
        with self.failures(), self._at_data(name) as file:
            return read_array(file, header, exact=self.is_archive)

    @contextlib.contextmanager
    def rows(self, name: str, header: Header) -> Iterator[Read]:
        """Reads rows start .. stop of an array of C order, mapped or unpacked in passing."""
        self.check_size(header)
        with self.failures():
            array = self.in_place(name, header)
        if array is not None:
            yield lambda start, stop: array[start:stop]
            return
        with self.failures():
            stream = Stream(lambda: self._at_data(name), header.dtype, header.shape)

        def read(start: int, stop: int) -> np.ndarray:
            with self.failures():
                return stream.rows(start, stop)

        with contextlib.closing(stream):
            yield read

    def in_place(self, name: str, header: Header) -> np.ndarray | None:
        """The array memory-mapped; None where it is compressed. Compares an archive's checksum."""
        if header.fortran:
            raise ValueError(
                "it is large and in Fortran order, where no image lies in one piece: store what "
                "numpy.ascontiguousarray makes of it"
            )
        if not self.is_archive:
            with self.path.open("rb") as file:
                read_header(file)
                return map_numbers(self.path, file.tell(), header.dtype, header.shape)
        with zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            return None
        with self.path.open("rb") as file:
            start = _content_of(file, member)
            file.seek(start)
            read_header(file)
            held = start + member.file_size - file.tell()
            if held != header.nbytes:
                words = "ends after" if held < header.nbytes else "holds more than"
                raise ValueError(
                    f"it {words} {min(held, header.nbytes):,} of {header.nbytes:,} bytes"
                )
            return map_numbers(self.path, file.tell(), header.dtype, header.shape)

    def _at_data(self, name: str) -> BinaryIO:
        """The file, or the member of the archive, from its first number on."""
        if not self.is_archive:
            file: BinaryIO = self.path.open("rb")
        else:
            with zipfile.ZipFile(self.path) as archive:  # a member that is open goes on without it
                file = archive.open(f"{name}.npy")  # type: ignore[assignment]
        read_header(file)
        return file

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Whatever goes wrong within `with` is a DataError."""
        try:
            yield
        except Exception as error:  # zipfile raises whatever an archive makes it
            raise self.unreadable(error) from error

    def unreadable(self, reason: object) -> DataError:
        words = brief(str(reason)) or type(reason).__name__
        return DataError(f"{self.path} is not a readable array: {words}")


def _content_of(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin; ValueError where its checksum is another."""
    file.seek(member.header_offset + 26)  # past what the archive's directory says too
    lengths = file.read(4)
    start = member.header_offset + 30
    start += sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    file.seek(start)
    checksum, left = 0, member.file_size
    while left and (piece := file.read(min(_PIECE, left))):
        checksum, left = zlib.crc32(piece, checksum), left - len(piece)
    if left or checksum != member.CRC:
        raise ValueError(f"{member.filename} is cut or damaged: its checksum differs")
    return start


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


def _channels_first(array: np.ndarray) -> np.ndarray:
    """An array of images of any layout as (N, C, H, W)."""
    layout = _layout(array.shape)
    assert layout is not None
    if array.ndim == 4 and array.shape[1:] != layout[1:]:
        array = array.transpose(0, 3, 1, 2)
    return array.reshape(layout)


@dataclass(frozen=True)
class ArraySource(RawSource):
    """An array of images in a `.npy` or `.npz` file."""

    name: str = ""
    header: Header = _NO_HEADER

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.header.dtype == np.uint8 else np.float32)

    @property
    def raw_shape(self) -> tuple[int, int, int]:
        layout = _layout(self.header.shape)
        assert layout is not None
        return layout[1:]

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self.name}"

    def in_place(self) -> np.ndarray | None:
        if self.dtype != np.uint8 or self.raw_shape != self.shape[1:]:
            return None
        file = _File(self.path)
        with file.failures():
            array = file.in_place(self.name, self.header)
        return None if array is None else _channels_first(array)

    @contextlib.contextmanager
    def rows(self) -> Iterator[Read]:
        with self._stored() as stored:
            if self.dtype == np.uint8:
                yield lambda start, stop: _channels_first(stored(start, stop))
                return
            is_unsigned = self._lowest(stored) >= 0

            def read(start: int, stop: int) -> np.ndarray:
                pixels = _channels_first(stored(start, stop)).astype(np.float32)
                if is_unsigned:
                    pixels *= np.float32(2)
                    pixels -= np.float32(1)
                return pixels

            yield read

    @contextlib.contextmanager
    def _stored(self) -> Iterator[Read]:
        """Rows of the array as they are stored."""
        file = _File(self.path)
        if self.header.fortran and self.header.nbytes <= IN_MEMORY:
            array = file.read(self.name, self.header)
            yield lambda start, stop: array[start:stop]
            return
        with file.rows(self.name, self.header) as rows:
            yield rows

    def _lowest(self, stored: Read) -> float:
        """The smallest of all floats; DataError where one is not finite, or out of range."""
        lows, highs = [], []
        step = pieces_of(self.raw_shape, self.header.dtype)
        for start in range(0, self.count, step):
            array = stored(start, min(start + step, self.count))
            bad = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
            if bad.any():
                first = start + int(bad.argmax())
                raise DataError(f"{self.path} holds NaN or infinity, first in image {first}")
            lows.append(float(array.min()))
            highs.append(float(array.max()))
        low, high = min(lows), max(highs)
        if low < -1 or high > 1:
            raise DataError(
                f"{self.path} holds floats in [{low:g}, {high:g}] instead of [-1, 1] or [0, 1]"
            )
        return low


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
