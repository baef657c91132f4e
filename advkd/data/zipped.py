"""A zip of images, as EDM's dataset_tool writes it: read where it lies, nothing is extracted.

The archive's directory is kept as names and numbers, about 200 bytes an image, where `zipfile`
takes 700; and threads read at once, each at its own place of the file.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from array import array
from pathlib import Path

from advkd.data.bounds import check_vouched
from advkd.data.labels import LABELS_FILE, longest_list
from advkd.data.picture import Packed
from advkd.data.pictures import PicturesSource
from advkd.data.selection import Listing, by_parts, passes_over_folder, select, source_of
from advkd.data.sentences import DataError, brief

_END = struct.Struct("<4s4H2LH")  # closes an archive
_LOCATOR = struct.Struct("<4sLQL")  # before it, where numbers need 64 bits
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory
_LOCAL = struct.Struct("<4s5H3L2H")  # before a member's content
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF_8 = 1 << 0, 1 << 11
_FULL = 0xFFFFFFFF  # stands for a number of 64 bits that lies elsewhere


class Archive:
    """The members of a zip file; every failure is a DataError that names the file."""

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        self._size = status.st_size
        self.state = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        self.names: list[str] = []
        self._offsets, self._packed, self._sizes = array("Q"), array("Q"), array("Q")
        self._checksums, self._methods = array("L"), array("H")
        self._read_directory(*self._directory())

    def __len__(self) -> int:
        return len(self.names)

    def _broken(self, why: str) -> DataError:
        return DataError(f"{self.path} is not a whole zip archive: {why}")

    def _at(self, offset: int, size: int) -> bytes:
        """These bytes of the file, or as many of them as it has."""
        try:
            return os.pread(self._file, max(0, min(size, self._size - offset)), offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error

    def _directory(self) -> tuple[int, bytes]:
        """The number of members, and the bytes of the directory."""
        start = max(0, self._size - _END.size - 0xFFFF)  # a comment may follow
        tail = self._at(start, self._size - start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + _END.size:
            raise self._broken("its directory is missing, as where it was cut off")
        _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
        if count == 0xFFFF or _FULL in (size, offset):
            head = self._at(start + at - _LOCATOR.size, _LOCATOR.size)
            if len(head) == _LOCATOR.size and head[:4] == b"PK\x06\x07":
                end = self._at(_LOCATOR.unpack(head)[2], _END_64.size)
                if len(end) < _END_64.size or end[:4] != b"PK\x06\x06":
                    raise self._broken("its directory is missing")
                *_, count, size, offset = _END_64.unpack(end)
        if offset + size > self._size:
            raise self._broken("its directory lies behind its end")
        return count, self._at(offset, size)

    def _read_directory(self, count: int, directory: bytes) -> None:
        at = 0
        for _ in range(count):
            if len(directory) < at + _ENTRY.size or directory[at : at + 4] != b"PK\x01\x02":
                raise self._broken("its directory is damaged")
            entry = _ENTRY.unpack_from(directory, at)
            name_end = at + _ENTRY.size + entry[10]
            encoding = "utf-8" if entry[3] & _UTF_8 else "cp437"
            name = directory[at + _ENTRY.size : name_end].decode(encoding, "replace")
            extra = directory[name_end : name_end + entry[11]]
            size, packed, offset = _wide((entry[9], entry[8], entry[16]), extra)
            self.names.append(name)
            self._offsets.append(offset)
            self._packed.append(packed)
            self._sizes.append(size)
            self._checksums.append(entry[7])
            self._methods.append(0xFFFF if entry[3] & _ENCRYPTED else entry[4])
            at = name_end + entry[11] + entry[12]

    def stored(self, number: int) -> int:
        """Bytes that a member takes in the archive."""
        return self._packed[number]

    def read(self, number: int) -> bytes:
        """The content of a member, whose checksum is compared."""
        name = self.name(number)
        size, packed, method = self._sizes[number], self._packed[number], self._methods[number]
        if method not in (_STORED, _DEFLATED):
            raise DataError(f"{name} is encrypted, or packed in a way that is not read")
        check_vouched(name, packed, size)
        head = self._at(self._offsets[number], _LOCAL.size)
        if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
            raise DataError(f"{name} is not where the archive's directory says")
        *_, name_length, extra_length = _LOCAL.unpack(head)
        start = self._offsets[number] + _LOCAL.size + name_length + extra_length
        content = self._at(start, packed)
        if method == _DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise DataError(f"{name} is damaged: {error}") from error
        if len(content) != size or zlib.crc32(content) != self._checksums[number]:
            raise DataError(f"{name} is cut or damaged: its checksum differs")
        return content

    def name(self, number: int) -> str:
        """A member as messages name it."""
        return f"{self.path}/{brief(self.names[number])}"


def _wide(numbers: tuple[int, ...], extra: bytes) -> list[int]:
    """Numbers of a directory's entry; those that are full are taken from the field of 64 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    found = []
    for number in numbers:
        if number == _FULL and len(wide) >= 8:
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(number)
    return found


class ZipPictures:
    """Images of an archive, by their numbers in its directory."""

    def __init__(self, archive: Archive, numbers: array[int]):
        self._archive, self._numbers = archive, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Packed:
        member = self._numbers[number]
        archive = self._archive
        return Packed(archive.name(member), archive.read(member), archive.stored(member))

    def fingerprint(self) -> str:
        """The archive's path, size and time."""
        return self._archive.state


def open_zip(
    path: Path, size: int | None, channels: int | None, crop: bool
) -> PicturesSource | None:
    """Read the headers of the images in a zip file; None where it holds arrays and no images.

    Splits, classes and what is passed over are those of a folder with the same files in it.
    DataError where it is damaged, or as for folders.
    """
    archive = Archive(path)
    listing, numbers = _list_images(archive)
    if not listing.files and any(name.endswith(".npy") for name in archive.names):
        return None
    listed = None
    if LABELS_FILE in archive.names:
        number = archive.names.index(LABELS_FILE)
        if archive._sizes[number] > longest_list(len(listing.files)):
            raise DataError(f"{archive.name(number)} is too large for its images")
        listed = archive.read(number)
    chosen = select(path, listing, listed)
    pictures = ZipPictures(archive, array("Q", (numbers[row] for row in chosen.rows)))
    return source_of(path, pictures, chosen, size, channels, crop)


def _list_images(archive: Archive) -> tuple[Listing, list[int]]:
    """The image files of an archive, and their numbers in its directory."""
    listing, names = Listing(), archive.names
    hidden: dict[str, str] = {}  # folders, and the folder above or there that is passed over
    numbers = []
    for number, name in enumerate(names):
        folder, _, file = name.rpartition("/")
        if folder not in hidden:
            hidden[folder] = _passed_over(folder)
        if not hidden[folder] and file and listing.takes(name):
            numbers.append(number)
    numbers.sort(key=lambda number: by_parts(names[number]))
    # Of several members of one name the last counts, as for whoever extracts them.
    later = [*numbers[1:], -1]
    numbers = [n for n, m in zip(numbers, later, strict=False) if m < 0 or names[n] != names[m]]
    listing.files = [names[number] for number in numbers]
    passed = len({folder for folder in hidden.values() if folder})
    listing.passed.update({"hidden or system folders": passed} if passed else {})
    return listing, numbers


def _passed_over(folder: str) -> str:
    """The first folder of a path in which nothing is read; empty where there is none."""
    parts = folder.split("/")
    depth = next((i for i, part in enumerate(parts, 1) if passes_over_folder(part)), 0)
    return "/".join(parts[:depth])
