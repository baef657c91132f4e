"""A folder of image files, searched through all its levels.

Links to folders are followed; a folder is entered once, so links that lead in circles end. Which
of the files are read is up to `advkd.data.selection`.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from advkd.data.labels import LABELS_FILE, longest_list
from advkd.data.pictures import PicturesSource
from advkd.data.selection import Listing, Parts, by_parts, passes_over_folder, select, source_of
from advkd.data.sentences import DataError


def list_images(folder: Path) -> Listing:
    """Find the image files below a folder; DataError for a folder that cannot be read."""
    found = Listing()
    seen: set[tuple[int, int]] = set()  # folders by device and inode
    folders: deque[Parts] = deque([()])
    links: deque[Parts] = deque()  # followed last, so that no link takes a real folder's place
    while folders or links:
        is_link = not folders
        below = links.popleft() if is_link else folders.popleft()
        place = folder.joinpath(*below)
        try:
            status = place.stat()
            identity = (status.st_dev, status.st_ino)
            # A link to a folder above would bring in what lies beside the folder.
            if identity in seen or (is_link and folder.resolve().is_relative_to(place.resolve())):
                found.passed["links to folders that are read already"] += 1
                continue
            seen.add(identity)
            if below and _is_run(place):
                found.passed["folders of runs"] += 1
                continue
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _sort_in(entry, below, found, folders, links)
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error.strerror}") from error
    found.files.sort(key=by_parts)
    return found


def _is_run(folder: Path) -> bool:
    """Whether a training lies there, whose previews and reports are no images to learn from."""
    try:
        with (folder / "config.toml").open("rb") as file:
            return file.read(9) == b"format = "
    except OSError:
        return False


def _sort_in(
    entry: os.DirEntry[str],
    below: Parts,
    found: Listing,
    folders: deque[Parts],
    links: deque[Parts],
) -> None:
    """Put one entry of the folder `below` where it belongs."""
    is_link = entry.is_symlink()
    if os.path.isdir(entry) if is_link else entry.is_dir():
        if passes_over_folder(entry.name):
            found.passed["hidden or system folders"] += 1
        else:
            (links if is_link else folders).append((*below, entry.name))
    elif os.path.isfile(entry) if is_link else entry.is_file():  # False for a broken link
        name = "/".join((*below, entry.name))
        if found.takes(name):
            found.files.append(name)
    elif entry.name.startswith("."):
        found.passed["hidden files"] += 1
    else:
        found.passed["broken links and special files"] += 1


class FolderPictures:
    """The image files of a folder, by their paths below it."""

    def __init__(self, folder: Path, files: Sequence[str]):
        self._folder, self._files = folder, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Path:
        return self._folder / self._files[number]

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times; DataError where one is gone."""
        digest = hashlib.sha256(str(self._folder.resolve()).encode("utf-8", "surrogateescape"))
        for name in self._files:
            path = os.path.join(self._folder, name)
            try:
                status = os.stat(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_folder(
    path: Path, listing: Listing, size: int | None, channels: int | None, crop: bool
) -> PicturesSource:
    """Read the headers of a folder's images, as `list_images` lists them.

    DataError where there is none, where one is broken, or where nothing tells size or channels.
    """
    chosen = select(path, listing, _listed_labels(path / LABELS_FILE, len(listing.files)))
    files = [listing.files[row] for row in chosen.rows]
    return source_of(path, FolderPictures(path, files), chosen, size, channels, crop)


def _listed_labels(file: Path, images: int) -> bytes | None:
    """What a file that lists the labels of so many images holds; None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return content.read(longest_list(images) + 1)
