"""Labels: whole numbers from 0 up, few enough to be classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from advkd.config import MAX_CLASSES
from advkd.data.source import DataError

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
