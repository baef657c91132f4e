"""Which of the image files of a folder or an archive are read, and their labels.

Of `train/` beside `test/` or `val/`, the training split alone is read. Labels are those of a
`dataset.json`, else the folders that the files lie in. Nothing is left out without a word: what is
passed over is counted.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from advkd.data.labels import LABELS_FILE, listed_labels
from advkd.data.picture import suffixes
from advkd.data.pictures import Pictures, PicturesSource, survey
from advkd.data.sentences import DataError, brief, plural

Parts = tuple[str, ...]  # a folder's path below the one that is read

_SYSTEM_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found")
_SPLIT_END = r"([ _-]?(images?|imgs?|data|set|split))?"
_TRAINING = re.compile(rf"(train|training){_SPLIT_END}", re.IGNORECASE)
_HELD_OUT = re.compile(rf"(test|testing|val|valid|validation|dev|eval){_SPLIT_END}", re.IGNORECASE)
_NAMED = 12  # kinds of files that a note tells apart


def passes_over_folder(name: str) -> bool:
    """Whether nothing in a folder of this name is read."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


@dataclass
class Listing:
    """The image files of a folder or an archive, sorted; what is no image is counted by kind.

    A file is its path below the folder, with slashes: one string each, since there may be millions.
    """

    files: list[str] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    def takes(self, name: str) -> bool:
        """Whether a file is an image by its name; one that is not is counted."""
        suffix = os.path.splitext(name)[1].lower()
        if name.rpartition("/")[2].startswith("."):
            self.passed["hidden files"] += 1
        elif suffix in suffixes():
            return True
        else:
            self.passed[f"{suffix} files" if suffix else "files without a suffix"] += 1
        return False


def by_parts(name: str) -> str:
    """A key that sorts files folder by folder."""
    return name.replace("/", "\0")


def _counted(counts: Counter[str]) -> str:
    """The most frequent entries with their counts, and the sum of the others."""
    entries = counts.most_common()
    named = [f"{brief(what, 60)} ({count:,})" for what, count in entries[:_NAMED]]
    others = sum(count for _, count in entries[_NAMED:])
    return ", ".join([*named, f"others ({others:,})"] if others else named)


@dataclass
class Split:
    """The training files of a listing, and what was left out of it."""

    rows: array[int] = field(default_factory=lambda: array("q"))  # of the listing
    folders: list[Parts] = field(default_factory=list)  # that hold them, less the split's own
    places: array[int] = field(default_factory=lambda: array("q"))  # which folder holds each file
    left_out: Counter[str] = field(default_factory=Counter)  # files by the place left out


def training_split(files: Sequence[str], where: Path) -> Split:
    """Keep the training files wherever folders named as splits lie side by side.

    DataError where held-out splits, and nothing else, lie side by side.
    """
    folders = dict.fromkeys(name.rpartition("/")[0] for name in files)
    children: dict[Parts, set[str]] = {}
    for folder in folders:
        parts = _parts(folder)
        for depth, name in enumerate(parts):
            children.setdefault(parts[:depth], set()).add(name)
    splits = {place for place, names in children.items() if _has_splits(names, where, place)}
    result = Split()
    places: dict[str, int | str | None] = {f: _place(_parts(f), splits, result) for f in folders}
    for row, name in enumerate(files):
        place = places[name.rpartition("/")[0]]
        if isinstance(place, int):
            result.rows.append(row)
            result.places.append(place)
        else:
            result.left_out[place or name] += 1
    return result


def _parts(folder: str) -> Parts:
    return tuple(folder.split("/")) if folder else ()


def _place(parts: Parts, splits: set[Parts], result: Split) -> int | str | None:
    """Which of the result's folders the files of a folder lie in; else what is left out with them,
    None for the files themselves."""
    depths = [depth for depth in range(len(parts) + 1) if parts[:depth] in splits]
    for depth in depths:
        if depth == len(parts):
            return None
        if not _TRAINING.fullmatch(parts[depth]):
            return "/".join(parts[: depth + 1])
    result.folders.append(tuple(name for depth, name in enumerate(parts) if depth not in depths))
    return len(result.folders) - 1


def _has_splits(names: set[str], where: Path, place: Parts) -> bool:
    held_out = sorted(name for name in names if _HELD_OUT.fullmatch(name))
    if len(held_out) == len(names) > 1:
        raise DataError(
            f"{where.joinpath(*place)} holds {' and '.join(held_out)} but no train: name the one "
            f"to read"
        )
    return bool(held_out) and any(_TRAINING.fullmatch(name) for name in names)


def classes_of(split: Split) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Labels and names of classes: the folders that the files lie in, at one level, two at least.

    Folders above the classes are shared by all files. None where there are no such classes.
    """
    names = sorted({folder[-1] for folder in split.folders if folder})
    above = {folder[:-1] for folder in split.folders}
    if len(names) < 2 or len(above) > 1 or () in split.folders:
        return None
    index = {name: label for label, name in enumerate(names)}
    labels = np.array([index[folder[-1]] for folder in split.folders], np.int64)
    return labels[np.asarray(split.places)], tuple(names)


class Selection(NamedTuple):
    """Which files of a listing are read, their labels and the classes' names, and notes on the
    others."""

    rows: array[int]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    notes: list[str]


def select(where: Path, listing: Listing, listed: bytes | None) -> Selection:
    """Choose among the files of a folder or an archive; `listed` is the content of its
    `dataset.json`, if it has one.

    DataError where there is no image, or where the list does not fit them.
    """
    if not listing.files:
        rest = _counted(listing.passed)
        raise DataError(f"{where} holds no images{rest and f'; passed over: {rest}'}")
    split, passed = training_split(listing.files, where), Counter(listing.passed)
    found = None
    if listed is not None:
        chosen = [listing.files[row] for row in split.rows]
        found = listed_labels(listed, chosen, listing.files, where / LABELS_FILE)
    if found is None:
        labels, classes = classes_of(split) or (None, None)
        notes = []
    else:
        labels, classes = found.values, None
        passed -= Counter({".json files": 1})
        notes = [f"{LABELS_FILE} gives {'no labels' if labels is None else 'the labels'}"]
    if split.left_out:
        kept = f"the training split alone is read ({plural(len(split.rows), 'image')})"
        notes.append(f"{kept}; left out: {_counted(split.left_out)}")
    notes += [f"passed over: {_counted(passed)}"] if passed else []
    return Selection(split.rows, labels, classes, notes)


def source_of(
    where: Path,
    pictures: Pictures,
    chosen: Selection,
    size: int | None,
    channels: int | None,
    crop: bool,
) -> PicturesSource:
    """The source of the chosen pictures, whose headers are read now."""
    seen = survey(pictures, size, channels, crop)
    return PicturesSource(
        path=where,
        count=len(pictures),
        size=seen.size,
        channels=seen.channels,
        crop=crop,
        labels=chosen.labels,
        classes=chosen.classes,
        notes=(*chosen.notes, *seen.notes),
        pictures=pictures,
        intervals=seen.intervals,
    )
