"""One image file: what its header says, and its pixels as bytes.

Files are read by Pillow, whatever their suffix and format, but for formats that Pillow only
recognizes, and for EPS, which it hands to an interpreter of PostScript.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from advkd.data.geometry import resized
from advkd.data.sentences import DataError, reason_of


class Packed(NamedTuple):
    """An image file that lies within another one."""

    name: str  # for people
    content: bytes
    stored: int  # bytes that it takes where it lies, compressed or not

    def __str__(self) -> str:
        return self.name


Picture = Path | Packed
Interval = tuple[float, float]  # the values that become black and white
_UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_GRAY_MODES = ("1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L", "I;16N")
_GRAY_ALPHA_16 = "LA;16B"  # raw mode of a PNG whose mode Pillow says is RGBA
_TRANSPARENT_SCALE = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}  # PNG's depth -> 8 bits
_ALWAYS = 1 << 24  # pixels that an image file of any size may have
_RATIO = 64  # pixels for each byte of the file; photographs have 1 to 20
_STRIP = 1 << 22  # pixels of a numeric image that are converted at once


@functools.cache
def suffixes() -> dict[str, str]:
    """Lower-case suffixes of the files that are read, and their formats, as Pillow names them."""
    readable = {"MPO", *_formats()}  # MPO is a JPEG with more images behind it
    registered = Image.registered_extensions()
    return {suffix: name for suffix, name in registered.items() if name in readable}


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats to try, the common ones first."""
    known = set(Image.registered_extensions().values()) & set(Image.OPEN)
    known -= {"JPEG", "PNG", *_UNREADABLE}
    return ("PNG", "JPEG", *sorted(known))


@contextlib.contextmanager
def _opened(file: Picture) -> Iterator[Image.Image]:
    """An image file, its header read; whatever goes wrong within `with` is a DataError."""
    try:
        content = io.BytesIO(file.content) if isinstance(file, Packed) else file
        with Image.open(content, formats=_formats()) as image:
            _check_pixels(file, image)
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is not a readable image: Pillow knows no such format") from error
    except Exception as error:  # decoders raise whatever their format makes them
        raise DataError(f"{file} is not a readable image: {reason_of(error)}") from error


def _check_pixels(file: Picture, image: Image.Image) -> None:
    """Raise ValueError for no pixels, or for more than the file's size vouches for.

    A few hundred bytes can claim any number, and decoders take up to 24 bytes for each.
    """
    width, height = image.size
    if width * height == 0:
        raise ValueError("it has no pixels")
    if width * height <= _ALWAYS:
        return
    stored = file.stored if isinstance(file, Packed) else file.stat().st_size
    if width * height > _RATIO * stored:
        raise ValueError(
            f"it claims {width}x{height} pixels, which a file of {stored:,} bytes does not vouch "
            f"for"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within `with`, Pillow does not warn of odd metadata, and of sizes that are checked here.

    Whoever reads many files needs it once, around all threads: filters of warnings are global.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Head(NamedTuple):
    """What an image file's header says."""

    width: int
    height: int
    channels: int  # 1 for grayscale, 3 for everything else
    numbers: str  # "I" for whole numbers of more than 8 bits, "F" for floats, "" for bytes
    has_frames: bool  # whether more images follow the first


def read_head(file: Picture) -> Head:
    """The header of an image file; DataError names a file that is no image."""
    with _opened(file) as image:
        gray = image.mode in _GRAY_MODES or _raw_mode(image) == _GRAY_ALPHA_16
        return Head(*image.size, 1 if gray else 3, _numbers(image), _has_frames(image))


def _numbers(image: Image.Image) -> str:
    return image.mode[0] if image.mode[0] in "FI" else ""


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # of a second frame that is broken, and not asked for
        return False


def _raw_mode(image: Image.Image) -> str:
    """How a PNG's pixels are stored, of which Pillow's mode is what they are decoded to."""
    tile = getattr(image, "tile", ()) if image.format == "PNG" else ()
    return str(tile[0].args) if tile else ""


def interval_of(files: Iterable[Picture], numbers: str) -> Interval:
    """The interval that stands for black to white in all of these files of one kind of numbers.

    Whole numbers are in [0, 255], or in [0, 65535] where any is above 255. Floats are in [0, 1],
    or in [-1, 1] where any is negative, or in [0, 255] where any is above 1. The values settle
    it, since files of 16 and 32 bits do not say; reading stops where it is settled.
    """
    for file in files:
        with _opened(file) as image:
            low, high = np.ravel(image.getextrema())
        if numbers == "I" and high > 255:
            return 0.0, 65535.0
        if numbers == "F" and high > 1:
            return 0.0, 255.0
        if numbers == "F" and low < 0:
            return -1.0, 1.0
    return (0.0, 255.0) if numbers == "I" else (0.0, 1.0)


def read_picture(
    file: Picture, size: int, channels: int, crop: bool, intervals: dict[str, Interval]
) -> np.ndarray:
    """The first image of a file as uint8 (channels, size, size), turned as its EXIF says.

    Transparent pixels are laid on white. `intervals` holds the `interval_of` each kind of numbers.
    """
    with _opened(file) as image:
        _correct_transparency(image)
        ImageOps.exif_transpose(image, in_place=True)
        numbers = _numbers(image)
        if numbers:
            picture = _numbers_as_bytes(image, intervals[numbers])
        else:
            picture = _on_white(image) if image.has_transparency_data else image
        mode = "L" if channels == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        values = np.asarray(resized(picture, size, crop))
    return values.reshape(size, size, channels).transpose(2, 0, 1)


def _correct_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent color, which Pillow leaves in the file's depth, to 8 bits."""
    scale, color = _TRANSPARENT_SCALE.get(_raw_mode(image)), image.info.get("transparency")
    if scale is not None and color is not None:
        values = [int(value * scale) for value in np.atleast_1d(color)]
        image.info["transparency"] = tuple(values) if len(values) > 1 else values[0]


def _on_white(image: Image.Image) -> Image.Image:
    """An image with transparency on a white ground, as RGB."""
    # What is under transparent pixels is arbitrary, so it must not show.
    overlay = image if image.mode == "RGBA" else image.convert("RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(overlay, mask=overlay.getchannel("A"))
    return ground


def _numbers_as_bytes(image: Image.Image, interval: Interval) -> Image.Image:
    """An image of floats or long integers in mode L: the interval becomes [0, 255]."""
    low, high = interval
    width, height = image.size
    transparent = image.info.get("transparency")
    result = np.empty((height, width), np.uint8)
    rows = math.ceil(_STRIP / width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        values = np.asarray(strip).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
        if values.min() < low or values.max() > high:
            raise ValueError(
                f"its values go from {values.min():g} to {values.max():g}, where "
                f"{low:g} to {high:g} are expected"
            )
        result[top : top + rows] = np.rint((values - low) / ((high - low) / 255))
        if transparent is not None:
            result[top : top + rows][values == transparent] = 255
    return Image.fromarray(result)
