"""Images to train and judge on: the data that ship, folders, arrays and IDX files.

Everything is read into one `ImageSet` in memory. Reading is deterministic: files are taken in
sorted order, and the same files give the same pixels. What cannot be read is a `DataError`, one
sentence that names the file.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

_SHIPPED = Path(__file__).parent / "datasets" / "fashion-mnist"
CLASS_NAMES = (  # of the shipped data's labels 0 .. 9
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_IDX_UBYTE = 0x08  # the IDX header's code for unsigned bytes, the only one that MNIST-like sets use
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow's mode L


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    pixels: (N, C, H, W), uint8 in [0, 255] or float32 in [-1, 1].
    labels: (N,) int64 class indices from 0 up, or None.
    source: where the images come from, for people to read.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def size(self) -> int:
        """Height = width of the images, in pixels."""
        return int(self.pixels.shape[2])

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label; None where there are no labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def batch(
        self, indices: Sequence[int] | np.ndarray, flip: np.ndarray | None = None
    ) -> torch.Tensor:
        """Images `indices` as float32 (B, C, H, W) in [-1, 1]; bytes v become v / 127.5 - 1.

        flip: (B,) bool, True mirrors that image left to right.
        """
        chosen = self.pixels[np.asarray(indices, dtype=np.int64)]
        if flip is not None:
            mask = np.asarray(flip, dtype=bool)
            chosen[mask] = chosen[mask, :, :, ::-1]
        if chosen.dtype == np.uint8:
            chosen = chosen.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return torch.from_numpy(np.ascontiguousarray(chosen))


def shipped(split: Literal["train", "test"]) -> ImageSet:
    """The part of Fashion-MNIST in this package: 28x28 greyscale, 10 classes, with labels.

    "train" has 10,000 images, 1,000 of each class; "test" has 2,000 held-out ones, 200 of each.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is neither 'train' nor 'test'")
    stem = "train" if split == "train" else "t10k"
    pixels, labels = _read_idx_pair(_SHIPPED / f"{stem}-images-idx3-ubyte.gz")
    return ImageSet(pixels, labels, f"Fashion-MNIST ({split}, shipped)")


def load_images(
    path: str | Path, *, size: int | None = None, channels: int | None = None, crop: bool = True
) -> ImageSet:
    """Reads a folder of images, a `.npz`/`.npy` array, or IDX files (plain or gzipped).

    size: pixels of a side of the result; None keeps square images of one size up to 256 and else
        takes the largest of 32, 64, 128, 256 that no image's shorter side falls below (for images
        below 32: their shorter side; for arrays: H and W's smaller).
    channels: 1 or 3 converts; None keeps them, and a folder that mixes both is an error.
    crop: True scales the shorter side and cuts the centre; False scales both sides.

    Folder: searched through all levels in sorted order; transparent pixels become white. Where
    every image lies in one of at least two direct subfolders, these are the classes, by name. A
    folder with IDX files reads those; of several, the one whose name begins with `train`.
    Arrays: uint8, or floats in [-1, 1] (in [0, 1] where none is negative); shape (N, H, W),
    (N, C, H, W) or (N, H, W, C) with C 1 or 3. In `.npz` the images are `images`, `x` or the only
    other array than the labels `labels` or `y`.
    IDX: labels are read from the file beside it (`images` -> `labels`, `idx3` -> `idx1`).

    Raises DataError, naming the file, for whatever cannot be read or holds no finite image.
    """
    path = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"size={size} is below 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels} is neither 1 nor 3")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        idx = _idx_of_folder(path)
        if idx is None:
            return _read_folder(path, size, channels, crop)
        pixels, labels = _read_idx_pair(idx)
    elif path.suffix in (".npz", ".npy"):
        pixels, labels = _read_array(path)
    elif "idx3" in path.name:
        pixels, labels = _read_idx_pair(path)
    else:
        raise DataError(f"{path} is neither a folder, nor a .npz or .npy array, nor an IDX file")
    if len(pixels) == 0 or 0 in pixels.shape:
        raise DataError(f"{path} holds no images: its shape is {pixels.shape}")
    return ImageSet(_conform(pixels, size, channels, crop), labels, str(path))


def _resize(image: Image.Image, size: int, crop: bool) -> Image.Image:
    """A (size, size) image of any single mode; `crop` takes the largest centred square."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if crop else (0, 0, width, height)
    # Both weigh all pixels under the target's; Hamming does not ring, and is sharper than a tent.
    shrinks = side >= size
    filter_ = Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC
    return image.resize((size, size), filter_, box=box)


def _default_size(sides: list[tuple[int, int]]) -> int:
    """The `size` that `load_images` takes for images of these (width, height)."""
    shorter = min(min(pair) for pair in sides)
    uniform = len(set(sides)) == 1 and sides[0][0] == sides[0][1]
    if shorter < 32 or (uniform and shorter <= 256):
        return shorter
    return max(size for size in (32, 64, 128, 256) if size <= shorter)


def _conform(pixels: np.ndarray, size: int | None, channels: int | None, crop: bool) -> np.ndarray:
    """Arrays (N, C, H, W) to `size` and `channels`, in their dtype."""
    if size is None:
        size = min(pixels.shape[2:])
    if pixels.shape[2:] != (size, size):
        planes = pixels.reshape(-1, *pixels.shape[2:])
        resized = [np.asarray(_resize(Image.fromarray(plane), size, crop)) for plane in planes]
        pixels = np.stack(resized).reshape(*pixels.shape[:2], size, size)
        if pixels.dtype != np.uint8:
            pixels = pixels.clip(-1, 1)  # bicubic overshoots
    if channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.repeat(3, axis=1)
    elif channels == 1 and pixels.shape[1] == 3:
        luma = np.tensordot(_LUMA, pixels, axes=(0, 1))[:, None]  # (N, 1, H, W)
        pixels = np.rint(luma).astype(np.uint8) if pixels.dtype == np.uint8 else luma
    return np.ascontiguousarray(pixels)


def _read_folder(path: Path, size: int | None, channels: int | None, crop: bool) -> ImageSet:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise DataError(f"{path} holds no images ({', '.join(_SUFFIXES)})")
    heads = [_read_image_head(file) for file in files]
    if channels is None:
        channels = heads[0][1]
        for file, (_, found) in zip(files, heads, strict=True):
            if found != channels:
                first, other = ("greyscale", "RGB") if channels == 1 else ("RGB", "greyscale")
                raise DataError(f"{files[0]} is {first} but {file} is {other}; ask for channels")
    if size is None:
        size = _default_size([sides for sides, _ in heads])
    pixels = np.empty((len(files), channels, size, size), np.uint8)
    for row, file in zip(pixels, files, strict=True):
        row[:] = _read_image(file, size, channels, crop)
    return ImageSet(pixels, _folder_labels(path, files), str(path))


def _folder_labels(path: Path, files: list[Path]) -> np.ndarray | None:
    names = sorted({file.parent.name for file in files})
    if len(names) < 2 or any(file.parent.parent != path for file in files):
        return None
    return np.array([names.index(file.parent.name) for file in files], np.int64)


def _read_image_head(file: Path) -> tuple[tuple[int, int], int]:
    """((width, height), channels) of an image file, 1 for greyscale and 3 for all else."""
    try:
        with Image.open(file) as image:
            return image.size, 1 if image.mode in _GREY_MODES else 3
    except Exception as error:  # decoders raise whatever their format makes them
        raise DataError(f"{file} is not a readable image: {error}") from error


def _read_image(file: Path, size: int, channels: int, crop: bool) -> np.ndarray:
    """An image file as uint8 (channels, size, size)."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits
                values = np.asarray(image).astype(np.int64).clip(0, 65535)
                image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
            elif image.mode not in ("L", "RGB"):
                # What is under transparent pixels is arbitrary: lay the image on white.
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            image = image.convert("L" if channels == 1 else "RGB")
            resized = np.asarray(_resize(image, size, crop))
    except Exception as error:  # as above
        raise DataError(f"{file} is not a readable image: {error}") from error
    return resized.reshape(size, size, channels).transpose(2, 0, 1)


def _read_array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (N, C, H, W), uint8 or float32 in [-1, 1], and labels of a `.npy` or `.npz` file."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable array: {error}") from error
    label_key = next((key for key in ("labels", "y") if key in arrays), None)
    labels = None if label_key is None else arrays.pop(label_key)
    image_key = next((key for key in ("images", "x") if key in arrays), None)
    if image_key is None and len(arrays) == 1:
        image_key = next(iter(arrays))
    if image_key is None:
        names = ", ".join(sorted(arrays)) or "none"
        raise DataError(f"{path} does not say which array is the images (found: {names})")
    pixels = _as_pixels(arrays[image_key], path)
    return pixels, _checked_labels(labels, len(pixels), path)


def _as_pixels(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{path} has shape {array.shape} instead of (N, H, W), (N, C, H, W) or (N, H, W, C) "
            f"with C = 1 or 3"
        )
    if array.dtype == np.uint8 or array.size == 0:
        return array
    if array.dtype.kind != "f":
        raise DataError(f"{path} holds {array.dtype} where uint8 or floats are needed")
    bad = ~np.isfinite(array).all(axis=(1, 2, 3))
    if bad.any():
        raise DataError(f"{path} holds NaN or infinity, first in image {int(bad.argmax())}")
    low, high = float(array.min()), float(array.max())
    if low < -1 or high > 1:
        raise DataError(f"{path} holds floats in [{low:g}, {high:g}] instead of [-1, 1] or [0, 1]")
    array = array.astype(np.float32)
    return array if low < 0 else array * np.float32(2) - np.float32(1)


def _checked_labels(labels: np.ndarray | None, count: int, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise DataError(
            f"{path} needs labels of shape ({count},) that are whole numbers from 0 up, not "
            f"{labels.dtype} of shape {labels.shape}"
        )
    return labels.astype(np.int64)


def _idx_of_folder(path: Path) -> Path | None:
    """The IDX file of images that a folder stands for; None where it has none."""
    files = sorted(file for file in path.iterdir() if file.is_file() and "idx3" in file.name)
    if len(files) > 1:
        files = [file for file in files if file.name.startswith("train")] or files
    if len(files) > 1:
        raise DataError(f"{path} holds {files[0].name} and {files[1].name}; name one of them")
    return files[0] if files else None


def _read_idx_pair(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (N, 1, H, W) uint8 of an IDX file, and the labels of the file beside it, if any."""
    pixels = _read_idx(path, 3)[:, None]
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    for beside in (path.with_name(plain), path.with_name(f"{plain}.gz")):
        if beside.is_file():
            return pixels, _checked_labels(_read_idx(beside, 1), len(pixels), beside)
    return pixels, None


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not: uint8 with `ndim` axes."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * ndim
    if len(raw) < header or raw[0] or raw[1] or raw[2] != _IDX_UBYTE or raw[3] != ndim:
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {ndim} axes")
    shape = np.frombuffer(raw, ">u4", ndim, 4).astype(np.int64)
    expected = header + int(shape.prod())
    if len(raw) != expected:
        raise DataError(f"{path} holds {len(raw)} bytes where its header asks for {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
