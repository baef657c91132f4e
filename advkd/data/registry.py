"""Data sets by name: a folder with a `dataset.toml` is a data set.

A folder advkd/data/datasets/NAME ships with the package; more folders of data sets are named in the
environment variable ADVKD_DATASETS, separated as in PATH; and a path to such a folder serves too.

    title = "Fashion-MNIST"    # for people
    size = 28                  # pixels of a side
    channels = 1               # 1 or 3
    classes = ["T-shirt/top", "trouser"]  # names, label 0 first; none = no labels
    license = "MIT"
    flip = true                # whether a mirrored image is still one of the data
    features = "zoo:fashion-mnist-features"  # the network that evaluates, or a folder in this one

    [splits]                   # folders, arrays or IDX files in this folder
    train = "train-images-idx3-ubyte.gz"
    test = "t10k-images-idx3-ubyte.gz"       # none = a part of train is held out
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from advkd.config import MAX_SIDE, ConfigError, build, check_lengths, nearest, within
from advkd.data.readers import open_source
from advkd.data.sentences import DataError, brief
from advkd.data.source import ImageSet, Source

DESCRIPTION = "dataset.toml"
SEARCH_PATH = "ADVKD_DATASETS"
DEFAULT = "fashion-mnist"  # of a run that names neither images nor a teacher
_SHIPPED = Path(__file__).parent / "datasets"
_MAX_BYTES = 1 << 20  # of a dataset.toml


@dataclass(frozen=True)
class Splits:
    """Where in a data set's folder its images are."""

    train: str = ""
    test: str = ""


@dataclass(frozen=True)
class Description:
    """What a dataset.toml says; the keys are explained at the top of this file."""

    title: str = ""
    size: int = within(0, 1, MAX_SIDE)
    channels: int = within(1, 1, 3)
    classes: tuple[str, ...] = ()
    license: str = ""
    flip: bool = True
    features: str = ""
    splits: Splits = field(default_factory=Splits)


@dataclass(frozen=True)
class Dataset(Description):
    """A data set: its description, its name and its folder."""

    name: str = ""
    folder: Path = Path()

    @property
    def shape(self) -> tuple[int, int]:
        """(size, channels) of its images."""
        return self.size, self.channels

    def open(
        self,
        split: Literal["train", "test"],
        *,
        size: int | None = None,
        channels: int | None = None,
        crop: bool = True,
    ) -> Source:
        """Read the headers of a split; size and channels are the data set's unless given.

        Raises DataError where the split is absent or its labels are not the classes.
        """
        place = {"train": self.splits.train, "test": self.splits.test}[split]
        if not place:
            raise DataError(f"{self.folder / DESCRIPTION} names no {split} split")
        path = self.folder / place
        if not path.exists():
            raise DataError(f"{self.folder / DESCRIPTION} names {path}, which does not exist")
        source = open_source(path, size or self.size, channels or self.channels, crop)
        title = f"{self.title or self.name} ({split})"
        if self.classes:
            labels = self._labels(source)
            return dataclasses.replace(source, labels=labels, classes=self.classes, title=title)
        note = [f"labels are left out, since {DESCRIPTION} lists no classes"]
        notes = (*source.notes, *(note if source.labels is not None else []))
        return dataclasses.replace(source, labels=None, classes=None, notes=notes, title=title)

    def train(self) -> ImageSet:
        """The images to train on."""
        return self.open("train").load()

    def test(self) -> ImageSet:
        """The held-out images; DataError where the data set has none."""
        return self.open("test").load()

    @property
    def features_source(self) -> str:
        """The feature network as `zoo:NAME` or a path; empty where the data set names none."""
        own = self.features and not self.features.startswith("zoo:")
        return str(self.folder / self.features) if own else self.features

    def _labels(self, source: Source) -> np.ndarray:
        """Labels of a split by this data set's list of classes."""
        if source.labels is None:
            raise DataError(f"{source.path} has no labels for the {len(self.classes)} classes")
        if source.classes is None:
            if source.labels.max() >= len(self.classes):
                raise DataError(
                    f"{source.path} has the label {source.labels.max()}, but "
                    f"{self.folder / DESCRIPTION} names {len(self.classes)} classes"
                )
            return source.labels
        unknown = [name for name in source.classes if name not in self.classes]
        if unknown:
            raise DataError(
                f"{source.path} holds the folder {unknown[0]!r}, which is no class of "
                f"{self.folder / DESCRIPTION}{nearest(unknown[0], self.classes)}"
            )
        order = np.array([self.classes.index(name) for name in source.classes])
        return order[source.labels]


def dataset(name: str | Path) -> Dataset:
    """A data set by its name, or by the path of its folder.

    Raises DataError where there is none, or where its dataset.toml is wrong.
    """
    found = find(name)
    if found is None:
        advice = nearest(str(name), dataset_names())
        raise DataError(f"there is no data set {str(name)!r}{advice}")
    return found


def find(name: str | Path) -> Dataset | None:
    """As `dataset`, but None where neither a name nor a folder with a dataset.toml is given."""
    if os.path.isfile(Path(name) / DESCRIPTION):
        return _read(Path(name))
    if os.path.exists(name):
        return None
    return next((_read(folder) for folder in _registered() if folder.name == str(name)), None)


def dataset_names() -> list[str]:
    """Names of the data sets that ship, and of those in the folders of ADVKD_DATASETS."""
    return [folder.name for folder in _registered()]


def for_shape(size: int, channels: int) -> Dataset | None:
    """The first data set whose images have this shape, those that ship first; None without one."""
    described = (_read(folder) for folder in _registered())
    return next((d for d in described if d.shape == (size, channels)), None)


def for_teacher(source: str) -> Dataset | None:
    """The data set that a teacher of the zoo was trained on, which its name tells: `zoo:NAME`, or
    `zoo:NAME-...` where there are several, is of the data set NAME that ships. None for others."""
    scheme, _, teacher = source.partition(":")
    found = [f for f in _folders(_SHIPPED) if f"{teacher}-".startswith(f"{f.name}-")]
    if scheme != "zoo" or not found:
        return None
    return _read(max(found, key=lambda folder: len(folder.name)))


def default_dataset() -> Dataset:
    """The data set of runs that name neither images nor a teacher."""
    return _read(_SHIPPED / DEFAULT)


def _registered() -> Iterator[Path]:
    """Folders of all registered data sets, by name within each folder that holds some."""
    places = [_SHIPPED, *map(Path, filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)))]
    for place in places:
        yield from _folders(place)


def _folders(place: Path) -> list[Path]:
    """The folders of data sets in this one, by name."""
    return sorted(file.parent for file in place.glob(f"*/{DESCRIPTION}"))


def _read(folder: Path) -> Dataset:
    """The data set of a folder, its dataset.toml checked key by key."""
    file = folder / DESCRIPTION
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        tree = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        described: Description = build(Description, tree, "")
        _check(described)
    except Exception as error:  # tomllib raises RecursionError and others beside its own
        reason = brief(str(error)) or type(error).__name__
        raise DataError(f"{file} cannot be used: {reason}") from error
    fields = {f.name: getattr(described, f.name) for f in dataclasses.fields(described)}
    return Dataset(**fields, name=folder.resolve().name, folder=folder)


def _check(described: Description) -> None:
    """Raise ConfigError for what a description lacks, or what its keys cannot mean."""
    if not described.size:
        raise ConfigError("it lacks the key 'size'")
    if described.channels not in (1, 3):
        raise ConfigError(f"channels={described.channels} is neither 1 nor 3")
    if not described.splits.train:
        raise ConfigError("it lacks the key 'splits.train'")
    if len(described.classes) == 1 or len(set(described.classes)) < len(described.classes):
        raise ConfigError("'classes' lists two names at least, each once")
    check_lengths("'classes'", described.classes)
    inside = {"splits.train": described.splits.train, "splits.test": described.splits.test}
    if not described.features.startswith("zoo:"):
        inside["features"] = described.features
    for key, place in inside.items():
        if PurePath(place).is_absolute() or ".." in PurePath(place).parts:
            raise ConfigError(f"{key}={place!r} leaves the data set's folder")
