"""Sizes and channels: images of any shape become squares of one size."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow's mode L
BLOCK = 256  # images that are converted at once


def resized(image: Image.Image, size: int, crop: bool) -> Image.Image:
    """A (size, size) image of the same mode; `crop` takes the largest centered square."""
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


def resize_notes(sides: Collection[tuple[int, int]], size: int, crop: bool) -> list[str]:
    """A line on what is resized, where any of these (width, height) is not (size, size)."""
    small, large = min(sides), max(sides)
    if small == large == (size, size):
        return []
    shapes = [f"{width}x{height}" for width, height in dict.fromkeys((small, large))]
    how = "the center of what is not square is cut out" if crop else "both sides are scaled"
    return [f"resized from {' to '.join(shapes)} pixels to {size}x{size}; {how}"]


def squared(pixels: np.ndarray, size: int, crop: bool) -> np.ndarray:
    """Arrays (N, C, H, W) as (N, C, size, size), in their dtype."""
    if pixels.shape[2:] == (size, size):
        return pixels
    result = np.empty((*pixels.shape[:2], size, size), pixels.dtype)
    for image, target in zip(pixels, result, strict=True):
        for plane, row in zip(image, target, strict=True):
            row[:] = np.asarray(resized(Image.fromarray(plane), size, crop))
    if pixels.dtype != np.uint8:
        result.clip(-1, 1, out=result)  # bicubic overshoots
    return result


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Arrays (N, C, S, S) with `channels`, C and `channels` 1 or 3, in their dtype.

    The last bits of a gray value depend on which images are converted together: what is read in
    parts is cut at multiples of 256 images, so that it is the same however large the parts are.
    """
    if channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.repeat(3, axis=1)
    elif channels == 1 and pixels.shape[1] == 3:
        gray = np.empty((len(pixels), 1, *pixels.shape[2:]), pixels.dtype)
        for start in range(0, len(pixels), BLOCK):
            part = slice(start, start + BLOCK)
            luma = np.tensordot(_LUMA, pixels[part], axes=(0, 1))  # (B, S, S)
            gray[part, 0] = np.rint(luma) if pixels.dtype == np.uint8 else luma
        pixels = gray
    return np.ascontiguousarray(pixels)
