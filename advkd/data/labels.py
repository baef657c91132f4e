"""Labels: whole numbers from 0 up, few enough to be classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from advkd.config import MAX_CLASSES
from advkd.data.sentences import DataError, brief, plural, reason_of

LABELS_FILE = "dataset.json"  # as EDM's and StyleGAN's dataset_tool write it
_ALWAYS = 1000  # classes that even a handful of images may have


def checked_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    """Labels of `count` images as (count,) int64; (count, 1) is taken too.

    A largest label makes its number of classes, and so parameters: there may be as many classes
    as images, 1,000 in any case, and 100,000 at most. Raises DataError, naming the file.
    """
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise DataError(
            f"{path} needs labels of shape ({count},) that are whole numbers from 0 up, not "
            f"{labels.dtype} of shape {labels.shape}"
        )
    largest, most = int(labels.max(initial=0)), min(max(_ALWAYS, count), MAX_CLASSES)
    if largest >= most:
        raise DataError(
            f"{path} has the label {largest}, which makes {largest + 1} classes, but {count} "
            f"images may have at most {most}: number the classes from 0 up without gaps"
        )
    return labels.astype(np.int64)


class ListedLabels(NamedTuple):
    """What a `dataset.json` says: labels (N,) int64, or that there are none."""

    values: np.ndarray | None


def longest_list(images: int) -> int:
    """Bytes that a `dataset.json` for so many images may have."""
    return (1 << 20) + 512 * images


def listed_labels(
    content: bytes, chosen: Sequence[str], known: Sequence[str], file: Path
) -> ListedLabels | None:
    """The labels of files that a `dataset.json` lists, {"labels": [["00000/a.png", 3], ...]}.

    chosen: the files that are read; known: all that are there.
    None where it is a list of something else. Raises DataError where a label is no whole number,
    where a file is listed that is not there, and where one is not listed.
    """
    if len(content) > longest_list(len(known)):
        raise DataError(f"{file} is too large for {plural(len(known), 'image')}")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {reason_of(error)}") from error
    if not isinstance(tree, dict) or "labels" not in tree:
        return None
    if tree["labels"] is None:
        return ListedLabels(None)
    listed = _by_name(tree["labels"], file)
    lacking = next((name for name in chosen if name not in listed), None)
    if lacking is not None:
        raise DataError(f"{file} gives no label for {brief(lacking)}")
    values = np.fromiter((listed[name] for name in chosen), np.int64, len(chosen))
    for name in known:
        listed.pop(name, None)
    if listed:
        raise DataError(f"{file} names {brief(next(iter(listed)))}, which is not there")
    return ListedLabels(checked_labels(values, len(chosen), file))


def _by_name(entries: Any, file: Path) -> dict[str, int]:
    """Labels by the names of their files."""
    if not isinstance(entries, list):
        raise DataError(f"{file} holds no list of labels")
    found: dict[str, int] = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise DataError(f"{file} holds {brief(repr(entry), 80)} instead of [name, label]")
        name, label = entry
        if type(label) is not int or not -(2**63) <= label < 2**63:
            raise DataError(
                f"{file} gives {brief(name)} the label {brief(repr(label), 80)}, which is no whole "
                "number"
            )
        if name in found:
            raise DataError(f"{file} gives {brief(name)} two labels")
        found[name] = label
    return found
