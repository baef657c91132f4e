"""A folder of image files: which of them are read, their classes, and what is passed over.

Folders are searched through all levels, links to folders included; a folder is entered once, so
links that lead in circles end. Of a folder that has `train/` beside `test/` or `val/`, the training
split alone is read. Nothing is left out without a word: what is passed over is counted.
"""

from __future__ import annotations

import os
import re
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from advkd.data.geometry import resize_notes
from advkd.data.picture import Head, Interval, interval_of, read_head, read_picture, suffixes
from advkd.data.source import DataError, Source, brief, plural

Parts = tuple[str, ...]  # a file's path below the folder

_SYSTEM_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found")
_SPLIT_END = r"([ _-]?(images?|imgs?|data|set|split))?"
_TRAINING = re.compile(rf"(train|training){_SPLIT_END}", re.IGNORECASE)
_HELD_OUT = re.compile(rf"(test|testing|val|valid|validation|dev|eval){_SPLIT_END}", re.IGNORECASE)
_NAMED = 12  # kinds of files that a note tells apart
_SIZES = (256, 128, 64, 32)  # taken by themselves where images have several sizes


@dataclass
class Listing:
    """The image files below a folder, sorted, and counts of what is no image, by kind."""

    files: list[Parts] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)


def _counted(counts: Counter[str]) -> str:
    """The most frequent entries with their counts, and the sum of the others."""
    entries = counts.most_common()
    named = [f"{brief(what, 60)} ({count:,})" for what, count in entries[:_NAMED]]
    others = sum(count for _, count in entries[_NAMED:])
    return ", ".join([*named, f"others ({others:,})"] if others else named)


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
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _sort_in(entry, (*below, entry.name), found, folders, links)
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error.strerror}") from error
    found.files.sort()
    return found


def _sort_in(
    entry: os.DirEntry[str],
    parts: Parts,
    found: Listing,
    folders: deque[Parts],
    links: deque[Parts],
) -> None:
    """Put one entry of a folder where it belongs."""
    is_folder, is_file = os.path.isdir(entry), os.path.isfile(entry)  # False for a broken link
    hidden = entry.name.startswith(".")
    if is_folder and (hidden or entry.name.lower() in _SYSTEM_FOLDERS):
        found.passed["hidden or system folders"] += 1
    elif is_folder:
        (links if entry.is_symlink() else folders).append(parts)
    elif hidden:
        found.passed["hidden files"] += 1
    elif not is_file:
        found.passed["broken links and special files"] += 1
    elif (suffix := os.path.splitext(entry.name)[1].lower()) in suffixes():
        found.files.append(parts)
    else:
        found.passed[f"{suffix} files" if suffix else "files without a suffix"] += 1


@dataclass
class Split:
    """The training files of a listing, and what was left out of it."""

    files: list[Parts] = field(default_factory=list)
    folders: list[Parts] = field(default_factory=list)  # of each file, less the split's own
    left_out: Counter[str] = field(default_factory=Counter)  # files by the place left out


def training_split(files: Sequence[Parts], where: Path) -> Split:
    """Keep the training files wherever folders named as splits lie side by side.

    DataError where held-out splits, and nothing else, lie side by side.
    """
    children: dict[Parts, set[str]] = {}
    for parts in files:
        for depth in range(len(parts) - 1):
            children.setdefault(parts[:depth], set()).add(parts[depth])
    places = {place for place, names in children.items() if _has_splits(names, where, place)}
    result = Split()
    for parts in files:
        below_split = [depth for depth in range(len(parts)) if parts[:depth] in places]
        outside = next((d for d in below_split if not _TRAINING.fullmatch(parts[d])), None)
        if outside is not None:
            result.left_out["/".join(parts[: outside + 1])] += 1
            continue
        result.files.append(parts)
        folders = enumerate(parts[:-1])
        result.folders.append(tuple(name for depth, name in folders if depth not in below_split))
    return result


def _has_splits(names: set[str], where: Path, place: Parts) -> bool:
    held_out = sorted(name for name in names if _HELD_OUT.fullmatch(name))
    if len(held_out) == len(names) > 1:
        raise DataError(
            f"{where.joinpath(*place)} holds {' and '.join(held_out)} but no train: name the one "
            f"to read"
        )
    return bool(held_out) and any(_TRAINING.fullmatch(name) for name in names)


def classes_of(folders: Sequence[Parts]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Labels and names of classes: the folders that the files lie in, at one level, two at least.

    Folders above the classes are shared by all files. None where there are no such classes.
    """
    names = sorted({folder[-1] for folder in folders if folder})
    above = {folder[:-1] for folder in folders}
    if len(names) < 2 or len(above) > 1 or () in folders:
        return None
    index = {name: label for label, name in enumerate(names)}
    return np.array([index[folder[-1]] for folder in folders], np.int64), tuple(names)


@dataclass(frozen=True)
class FolderSource(Source):
    """A folder of image files, each to be read into its place of one array of bytes."""

    files: tuple[Path, ...] = ()
    intervals: dict[str, Interval] = field(default_factory=dict)

    def pixels(self) -> np.ndarray:
        pixels = np.empty((self.count, self.channels, self.size, self.size), np.uint8)
        for row, file in zip(pixels, self.files, strict=True):
            row[:] = read_picture(file, self.size, self.channels, self.crop, self.intervals)
        return pixels


def open_folder(
    path: Path, listing: Listing, size: int | None, channels: int | None, crop: bool
) -> FolderSource:
    """Read the headers of a folder's images, as `list_images` lists them.

    DataError where there is none, where one is broken, or where nothing tells size or channels.
    """
    if not listing.files:
        passed = _counted(listing.passed)
        raise DataError(f"{path} holds no images{passed and f'; passed over: {passed}'}")
    split = training_split(listing.files, path)
    labels, classes = classes_of(split.folders) or (None, None)
    files = tuple(path.joinpath(*parts) for parts in split.files)
    heads = [read_head(file) for file in files]
    numeric = {
        kind: [file for file, head in zip(files, heads, strict=True) if head.numbers == kind]
        for kind in {head.numbers for head in heads} - {""}
    }
    intervals = {kind: interval_of(some, kind) for kind, some in numeric.items()}
    chosen = size or _default_size(files, heads)
    notes = [
        *_split_notes(split),
        *([f"passed over: {_counted(listing.passed)}"] if listing.passed else []),
        *_interval_notes(numeric, intervals),
        *_frame_notes(heads),
        *resize_notes([head[:2] for head in heads], chosen, crop),
    ]
    return FolderSource(
        path=path,
        count=len(files),
        size=chosen,
        channels=channels or _common_channels(files, heads),
        crop=crop,
        labels=labels,
        classes=classes,
        notes=tuple(notes),
        files=files,
        intervals=intervals,
    )


def _common_channels(files: Sequence[Path], heads: Sequence[Head]) -> int:
    channels = heads[0].channels
    for file, head in zip(files, heads, strict=True):
        if head.channels != channels:
            first, other = ("grayscale", "RGB") if channels == 1 else ("RGB", "grayscale")
            raise DataError(f"{files[0]} is {first} but {file} is {other}: choose the channels")
    return channels


def _default_size(files: Sequence[Path], heads: Sequence[Head]) -> int:
    """The `size` that `load_images` takes for images of these sizes."""
    sides = [min(head.width, head.height) for head in heads]
    shortest, middle = min(sides), statistics.median(sides)
    if shortest < _SIZES[-1] and 2 * shortest < middle:  # one stray image would shrink all others
        file, head = next(p for p in zip(files, heads, strict=True) if min(p[1][:2]) == shortest)
        raise DataError(
            f"{file} has only {head.width}x{head.height} pixels where half of the images have "
            f"{middle:g} or more a side: remove it, or choose a size"
        )
    square = len({head[:2] for head in heads}) == 1 and heads[0].width == heads[0].height
    if shortest < _SIZES[-1] or (square and shortest <= _SIZES[0]):
        return shortest
    return next(size for size in _SIZES if size <= shortest)


def _split_notes(split: Split) -> list[str]:
    if not split.left_out:
        return []
    kept = f"the training split alone is read ({plural(len(split.files), 'image')})"
    return [f"{kept}; left out: {_counted(split.left_out)}"]


def _interval_notes(numeric: dict[str, list[Path]], intervals: dict[str, Interval]) -> list[str]:
    kinds = {"I": "whole numbers of more than 8 bits", "F": "floats"}
    return [
        f"{plural(len(files), 'image')} of {kinds[kind]}: {intervals[kind][0]:g} is black and "
        f"{intervals[kind][1]:g} is white"
        for kind, files in sorted(numeric.items())
    ]


def _frame_notes(heads: Sequence[Head]) -> list[str]:
    count = sum(head.has_frames for head in heads)
    return [f"{plural(count, 'file')} with several images: the first is read"] if count else []
