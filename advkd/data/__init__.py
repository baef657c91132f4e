"""Images to train on and to compare with, data sets by name, and the store of trajectories."""

from __future__ import annotations

from advkd.data.images import load_images, probe
from advkd.data.registry import Dataset, dataset, dataset_names, find, for_shape
from advkd.data.sentences import DataError
from advkd.data.source import ImageSet, Source, describe

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
