"""Encoded images of a folder, an archive or a data set of the hub: looked at, then decoded."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
    heads = _look_at(pictures, lambda: None) if len(pictures) < MANY else _remembered(pictures)
    chosen = size or _default_size(pictures, heads)
    notes = [
        *_interval_notes(heads),
        *_frame_notes(heads),
        *resize_notes([head[:2] for head in heads.counts], chosen, crop),
    ]
    common = channels or _common_channels(pictures, heads)
    return Survey(chosen, common, heads.intervals, tuple(notes))


@dataclass
class _Heads:
    """Headers of all images: how often each occurs, and where first; and the intervals of the kinds
    of numbers among them."""

    counts: dict[Head, int] = field(default_factory=dict)
    first: dict[Head, int] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)


def _look_at(pictures: Pictures, tick: Callable[[], object]) -> _Heads:
    """Read all headers, and tell `tick` of each."""
    found = _Heads()
    numeric: dict[str, array[int]] = {}  # which images are of each kind of numbers
    with quiet():
        for number in range(len(pictures)):
            head = read_head(pictures[number])
            found.counts[head] = found.counts.get(head, 0) + 1
            found.first.setdefault(head, number)
            if head.numbers:
                numeric.setdefault(head.numbers, array("q")).append(number)
            tick()
        for kind, numbers in numeric.items():
            found.intervals[kind] = interval_of((pictures[number] for number in numbers), kind)
    return found


def _remembered(pictures: Pictures) -> _Heads:
    """The same from the cache, or into it."""

    def look() -> _Heads:
        with progress_bar("look at data", len(pictures), unit="image") as bar:
            return _look_at(pictures, bar.update)

    def make() -> dict[str, Any]:
        found = look()
        heads = [[*head, count, found.first[head]] for head, count in found.counts.items()]
        return {"heads": heads, "intervals": found.intervals}

    stored = remembered(key_of("heads", pictures.fingerprint()), make)
    try:
        return _as_heads(stored, len(pictures))
    except (LookupError, TypeError, ValueError, AttributeError):  # not what was written
        return look()


def _as_heads(stored: dict[str, Any], images: int) -> _Heads:
    found = _Heads()
    for width, height, channels, numbers, has_frames, count, first in stored["heads"]:
        head = Head(int(width), int(height), int(channels), str(numbers), bool(has_frames))
        found.counts[head], found.first[head] = int(count), range(images)[first]
    if sum(found.counts.values()) != images:
        raise ValueError("these are headers of other images")
    for kind, (low, high) in stored["intervals"].items():
        found.intervals[str(kind)] = float(low), float(high)
    return found


def _first_of(pictures: Pictures, heads: _Heads, some: Sequence[Head]) -> Picture:
    """The first image that has one of these headers."""
    return pictures[min(heads.first[head] for head in some)]


def _common_channels(pictures: Pictures, heads: _Heads) -> int:
    channels = next(iter(heads.first)).channels
    others = [head for head in heads.first if head.channels != channels]
    if others:
        first, other = ("grayscale", "RGB") if channels == 1 else ("RGB", "grayscale")
        another = _first_of(pictures, heads, others)
        raise DataError(f"{pictures[0]} is {first} but {another} is {other}: choose the channels")
    return channels


def _default_size(pictures: Pictures, heads: _Heads) -> int:
    """The `size` that `load_images` takes for images of these sizes."""
    sides = [min(head.width, head.height) for head in heads.counts]
    shortest = min(sides)
    middle = float(np.median(np.repeat(sides, list(heads.counts.values()))))
    if shortest < _SIZES[-1] and 2 * shortest < middle:  # one stray image would shrink all others
        small = [head for head in heads.first if min(head[:2]) == shortest]
        stray = _first_of(pictures, heads, small)
        width, height = min(small, key=heads.first.__getitem__)[:2]
        raise DataError(
            f"{stray} has only {width}x{height} pixels where half of the images have {middle:g} or "
            "more a side: remove it, or choose a size"
        )
    width, height = next(iter(heads.first))[:2]
    square = len({head[:2] for head in heads.first}) == 1 and width == height
    if shortest < _SIZES[-1] or (square and shortest <= _SIZES[0]):
        return shortest
    return next(size for size in _SIZES if size <= shortest)


def _interval_notes(heads: _Heads) -> list[str]:
    kinds = {"I": "whole numbers of more than 8 bits", "F": "floats"}
    notes = []
    for kind, (low, high) in sorted(heads.intervals.items()):
        count = sum(count for head, count in heads.counts.items() if head.numbers == kind)
        words = f"{low:g} is black and {high:g} is white"
        notes.append(f"{plural(count, 'image')} of {kinds[kind]}: {words}")
    return notes


def _frame_notes(heads: _Heads) -> list[str]:
    count = sum(count for head, count in heads.counts.items() if head.has_frames)
    return [f"{plural(count, 'file')} with several images: the first is read"] if count else []
