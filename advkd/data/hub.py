"""Images of a data set of the Hugging Face hub, by the library `datasets`, which is optional.

`hf:NAME` loads the split `train` of a data set of the hub; `hf:FOLDER` what `save_to_disk` wrote,
or a folder that `load_dataset` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from advkd.data.labels import checked_labels
from advkd.data.picture import Packed, Picture
from advkd.data.pictures import PicturesSource, survey
from advkd.data.sentences import DataError, reason_of

PREFIX = "hf:"
_TRAIN = "train"


class HubPictures:
    """The column of encoded images of a data set."""

    def __init__(self, name: str, rows: Any, column: str):
        self._name, self._rows, self._column = name, rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Picture:
        found = self._rows[number][self._column]
        name = f"{self._name}, image {number}"
        if found is None:
            raise DataError(f"{name} is missing")
        if found["bytes"] is not None:
            return Packed(name, found["bytes"], len(found["bytes"]))
        path = Path(found["path"] or "")
        if not path.is_file():
            raise DataError(f"{name} is {str(path)!r}, which is no file")
        return path

    def fingerprint(self) -> str:
        """The library's own: a hash of the files that the data set was made from."""
        files = [Path(file["filename"]) for file in self._rows.cache_files]
        states = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return f"{self._rows._fingerprint} {self._column} {' '.join(states)}"


def open_hub(name: str, size: int | None, channels: int | None, crop: bool) -> PicturesSource:
    """Load a data set and read the headers of its images.

    DataError where the library is not installed, and for whatever it cannot load.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} needs the library `datasets`, which is not installed: pip install 'advkd[hf]'"
        ) from error
    rows = _loaded(datasets, name)
    column = _column(name, rows.features, datasets.Image)
    labels, classes = _labels(name, rows, datasets.ClassLabel)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    pictures = HubPictures(name, rows, column)
    seen = survey(pictures, size, channels, crop)
    return PicturesSource(
        path=Path(name),
        count=len(pictures),
        size=seen.size,
        channels=seen.channels,
        crop=crop,
        labels=labels,
        classes=classes,
        notes=seen.notes,
        pictures=pictures,
        intervals=seen.intervals,
    )


def _loaded(datasets: Any, name: str) -> Any:
    """The rows of the training split."""
    place = name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.is_dir() else place
            found = datasets.load_dataset(where, split=_TRAIN)
    except Exception as error:  # of the library, and of those that it calls
        raise DataError(f"{name} cannot be loaded: {reason_of(error)}") from error
    if isinstance(found, dict):
        if _TRAIN not in found and len(found) != 1:
            splits = ", ".join(sorted(found)) or "none"
            raise DataError(f"{name} has no split {_TRAIN!r} (found: {splits})")
        found = found[_TRAIN] if _TRAIN in found else next(iter(found.values()))
    return found


def _column(name: str, features: Any, kind: type) -> str:
    """The column of images: the only one, or the one that is called so."""
    columns = [column for column, feature in features.items() if isinstance(feature, kind)]
    called = [column for column in columns if column in ("image", "img")]
    if len(columns) != 1 and len(called) != 1:
        listed = ", ".join(columns or features) or "none"
        raise DataError(f"{name} does not say which column holds the images (found: {listed})")
    return columns[0] if len(columns) == 1 else called[0]


def _labels(name: str, rows: Any, kind: type) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels and names of the classes: of the only column of classes, or of one called `label`."""
    columns = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    called = [column for column in ("label", "labels", "fine_label") if column in rows.features]
    column = columns[0] if len(columns) == 1 else next(iter(called), None)
    if column is None:
        return None, None
    values = rows.select_columns([column]).with_format("numpy")[:][column]
    labels = checked_labels(np.asarray(values), len(rows), Path(f"{name}, column {column}"))
    names = getattr(rows.features[column], "names", None)
    return labels, None if names is None else tuple(names)
