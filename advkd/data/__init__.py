"""Images to train on and to compare with, data sets by name, and the store of trajectories."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkd.data.images import load_images, probe
    from advkd.data.registry import Dataset, dataset, dataset_names, find, for_shape
    from advkd.data.sentences import DataError
    from advkd.data.source import ImageSet, Source, describe

_HOMES = {
    "images": ("load_images", "probe"),
    "registry": ("Dataset", "dataset", "dataset_names", "find", "for_shape"),
    "sentences": ("DataError",),
    "source": ("ImageSet", "Source", "describe"),
}

__all__ = [
    "DataError",
    "Dataset",
    "ImageSet",
    "Source",
    "dataset",
    "dataset_names",
    "describe",
    "find",
    "for_shape",
    "load_images",
    "probe",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that who needs one file of this package, such as its sentences, waits for no other.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"advkd.data.{home}"), name)
    raise AttributeError(f"module 'advkd.data' has no attribute {name!r}")
