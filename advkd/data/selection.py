"""Which of the image files of a folder or an archive are read, and their labels.

Of `train/` beside `test/` or `val/`, the training split alone is read. Labels are those of a
`dataset.json`, else the folders that the files lie in. Nothing is left out without a word: what is
passed over is counted.
"""

from __future__ import annotations

import os
import re
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

Parts = tuple[str, ...]  # a file's path below the folder

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
    """The image files of a folder or an archive, sorted; what is no image is counted by kind."""

    files: list[Parts] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    def add(self, parts: Parts) -> None:
        """Put a file where it belongs by its name."""
        suffix = os.path.splitext(parts[-1])[1].lower()
        if parts[-1].startswith("."):
            self.passed["hidden files"] += 1
        elif suffix in suffixes():
            self.files.append(parts)
        else:
            self.passed[f"{suffix} files" if suffix else "files without a suffix"] += 1


def _counted(counts: Counter[str]) -> str:
    """The most frequent entries with their counts, and the sum of the others."""
    entries = counts.most_common()
    named = [f"{brief(what, 60)} ({count:,})" for what, count in entries[:_NAMED]]
    others = sum(count for _, count in entries[_NAMED:])
    return ", ".join([*named, f"others ({others:,})"] if others else named)


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


class Selection(NamedTuple):
    """The files that are read, their labels and the classes' names, and notes on the rest."""

    files: list[Parts]
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
        found = listed_labels(listed, split.files, listing.files, where / LABELS_FILE)
    if found is None:
        labels, classes = classes_of(split.folders) or (None, None)
        notes = []
    else:
        labels, classes = found.values, None
        passed -= Counter({".json files": 1})
        notes = [f"{LABELS_FILE} gives {'no labels' if labels is None else 'the labels'}"]
    if split.left_out:
        kept = f"the training split alone is read ({plural(len(split.files), 'image')})"
        notes.append(f"{kept}; left out: {_counted(split.left_out)}")
    notes += [f"passed over: {_counted(passed)}"] if passed else []
    return Selection(split.files, labels, classes, notes)


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
