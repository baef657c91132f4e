"""Which reader a path is for: by the file's content, and by its suffix where that is broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from advkd.data.arrays import open_array
from advkd.data.folder import list_images, open_folder
from advkd.data.idx import idx_axes, idx_of_folder, open_idx
from advkd.data.picture import suffixes
from advkd.data.sentences import DataError, plural
from advkd.data.source import Source
from advkd.data.zipped import open_zip

_ARRAY_SUFFIXES = (".npy", ".npz")
_ARRAY_MAGIC = (b"\x93NUMPY",)
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")


def open_source(path: Path, size: int | None, channels: int | None, crop: bool) -> Source:
    """Read the headers of what a path names; see `advkd.data.load_images`."""
    try:
        if path.is_dir():
            return _open_folder(path, size, channels, crop)
        is_file = path.is_file()  # and no pipe or device, which might never end
        named_array = path.suffix.lower() in _ARRAY_SUFFIXES
        if is_file and not named_array and _begins_with(path, _ZIP_MAGIC):
            found = open_zip(path, size, channels, crop)
            return open_array(path, size, channels, crop) if found is None else found
        if is_file and (named_array or _begins_with(path, _ARRAY_MAGIC)):
            return open_array(path, size, channels, crop)
        if is_file and (idx_axes(path) is not None or "idx3" in path.name):
            return open_idx(path, size, channels, crop)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() in suffixes():
        raise DataError(f"{path} is one image: name the folder that it lies in")
    raise DataError(
        f"{path} is neither a folder, nor a zip, nor a .npz or .npy array, nor an IDX file"
    )


def _open_folder(path: Path, size: int | None, channels: int | None, crop: bool) -> Source:
    listing = list_images(path)
    found = idx_of_folder(path, by_name=not listing.files)
    if found is None:
        return open_folder(path, listing, size, channels, crop)
    file, others = found
    source = open_idx(file, size, channels, crop)
    note = f"{file.name} is read, with its labels if there are any, of {plural(others + 1, 'file')}"
    return dataclasses.replace(source, notes=(note, *source.notes))


def _begins_with(path: Path, magic: tuple[bytes, ...]) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith(magic)
