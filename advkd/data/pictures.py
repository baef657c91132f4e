"""Encoded images of a folder, an archive or a data set of the hub: looked at, then decoded."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from advkd.console import progress_bar
from advkd.data.cache import Read, key_of, remembered
from advkd.data.geometry import resize_notes
from advkd.data.picture import Head, Interval, Picture, interval_of, quiet, read_head, read_picture
from advkd.data.sentences import DataError, plural
from advkd.data.source import Source

MANY = 10_000  # images whose headers are worth remembering
_SIZES = (256, 128, 64, 32)  # taken by themselves where images have several sizes
_RUN = 16  # images that a thread decodes at a time


class Pictures(Protocol):
    """Encoded images by number; `fingerprint` changes where one of them does."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Picture: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Survey:
    """What the headers of all images say together."""

    size: int
    channels: int
    intervals: dict[str, Interval]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PicturesSource(Source):
    """Encoded images, each to be decoded into its place of an array of bytes."""

    pictures: Pictures = ()  # type: ignore[assignment]
    intervals: dict[str, Interval] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return f"{self.pictures.fingerprint()} {sorted(self.intervals.items())}"

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool, quiet():

            def read(start: int, stop: int) -> np.ndarray:
                pixels = np.empty((stop - start, *self.shape[1:]), np.uint8)
                runs = [range(i, min(i + _RUN, stop)) for i in range(start, stop, _RUN)]
                places = np.split(pixels, range(_RUN, len(pixels), _RUN))
                for _ in pool.map(self._decode, runs, places):
                    pass
                return pixels

            yield read

    def _decode(self, numbers: range, pixels: np.ndarray) -> None:
        for number, row in zip(numbers, pixels, strict=True):
            picture = self.pictures[number]
            row[:] = read_picture(picture, self.size, self.channels, self.crop, self.intervals)


def survey(pictures: Pictures, size: int | None, channels: int | None, crop: bool) -> Survey:
    """Read the headers of all images; DataError where one is broken, or where they do not tell the
    size or the channels that are None. Those of many are remembered in the cache."""
    if len(pictures) < MANY:
        return _surveyed(pictures, size, channels, crop)

    def make() -> Survey:
        with progress_bar("look at data", len(pictures), unit="image") as bar:
            return _surveyed(pictures, size, channels, crop, bar.update)

    key = key_of("survey", pictures.fingerprint(), size, channels, crop)
    found = remembered(key, lambda: asdict(make()))
    try:
        return _as_survey(found)
    except (KeyError, TypeError, ValueError, AttributeError):  # not what was written
        return make()


def _as_survey(found: dict[str, Any]) -> Survey:
    pairs = found["intervals"].items()
    intervals = {str(kind): (float(low), float(high)) for kind, (low, high) in pairs}
    notes = tuple(str(note) for note in found["notes"])
    return Survey(int(found["size"]), int(found["channels"]), intervals, notes)


class _Heads:
    """Headers of all images: how often each occurs, and where first."""

    def __init__(self, pictures: Pictures, tick: Callable[[], object]):
        """`tick` is called for every image."""
        self.pictures = pictures
        self.counts: dict[Head, int] = {}
        self.first: dict[Head, int] = {}
        self.sides = array("i")  # the shorter one of every image
        self.numeric: dict[str, array[int]] = {}  # which images are of each kind of numbers
        for number in range(len(pictures)):
            self._add(number, read_head(pictures[number]))
            tick()

    def _add(self, number: int, head: Head) -> None:
        self.counts[head] = self.counts.get(head, 0) + 1
        self.first.setdefault(head, number)
        self.sides.append(min(head.width, head.height))
        if head.numbers:
            self.numeric.setdefault(head.numbers, array("q")).append(number)

    def first_of(self, heads: Sequence[Head]) -> Picture:
        return self.pictures[min(self.first[head] for head in heads)]


def _surveyed(
    pictures: Pictures,
    size: int | None,
    channels: int | None,
    crop: bool,
    tick: Callable[[], object] = lambda: None,
) -> Survey:
    with quiet():
        heads = _Heads(pictures, tick)
        intervals = {
            kind: interval_of((pictures[number] for number in numbers), kind)
            for kind, numbers in heads.numeric.items()
        }
    chosen = size or _default_size(heads)
    notes = [
        *_interval_notes(heads, intervals),
        *_frame_notes(heads),
        *resize_notes([head[:2] for head in heads.counts], chosen, crop),
    ]
    return Survey(chosen, channels or _common_channels(heads), intervals, tuple(notes))


def _common_channels(heads: _Heads) -> int:
    channels = next(iter(heads.first)).channels
    others = [head for head in heads.first if head.channels != channels]
    if others:
        first, other = ("grayscale", "RGB") if channels == 1 else ("RGB", "grayscale")
        raise DataError(
            f"{heads.pictures[0]} is {first} but {heads.first_of(others)} is {other}: choose the "
            "channels"
        )
    return channels


def _default_size(heads: _Heads) -> int:
    """The `size` that `load_images` takes for images of these sizes."""
    sides = np.asarray(heads.sides)
    shortest, middle = int(sides.min()), float(np.median(sides))
    if shortest < _SIZES[-1] and 2 * shortest < middle:  # one stray image would shrink all others
        small = [head for head in heads.first if min(head[:2]) == shortest]
        width, height = small[0][:2]
        raise DataError(
            f"{heads.first_of(small)} has only {width}x{height} pixels where half of the images "
            f"have {middle:g} or more a side: remove it, or choose a size"
        )
    width, height = next(iter(heads.first))[:2]
    square = len({head[:2] for head in heads.first}) == 1 and width == height
    if shortest < _SIZES[-1] or (square and shortest <= _SIZES[0]):
        return shortest
    return next(size for size in _SIZES if size <= shortest)


def _interval_notes(heads: _Heads, intervals: dict[str, Interval]) -> list[str]:
    kinds = {"I": "whole numbers of more than 8 bits", "F": "floats"}
    return [
        f"{plural(len(numbers), 'image')} of {kinds[kind]}: {intervals[kind][0]:g} is black and "
        f"{intervals[kind][1]:g} is white"
        for kind, numbers in sorted(heads.numeric.items())
    ]


def _frame_notes(heads: _Heads) -> list[str]:
    count = sum(count for head, count in heads.counts.items() if head.has_frames)
    return [f"{plural(count, 'file')} with several images: the first is read"] if count else []
