"""The images of a report: grids, strips, and sheets with labels, as arrays of bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from advkd.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

GRID_COLUMNS = 6
GRID_ROWS = 8
TILE = 96  # pixels of a side that pictures aim at: small images grow, by whole factors
LARGEST_TILE = 128  # larger images shrink to it
LABEL = 34  # pixels that a labelled sheet leaves for its text
MARGIN = 12


@dataclass(frozen=True)
class Pictures:
    """The images of a report: float32 (n, C, H, W) in [-1, 1], C = 1 or 3.

    teacher, student: samples from the same x_T.
    data: real images, or None where the run has none.
    trajectory: K tensors (m, C, h_k, w_k), the teacher's targets for m images, earliest first.
    heads: K tensors (m, C, h_k, w_k), the student's heads for the same x_T.
    times: the timestep t of each of the K targets, the last one 0; empty where unknown.
    """

    teacher: Tensor
    student: Tensor
    data: Tensor | None
    trajectory: Sequence[Tensor] = ()
    heads: Sequence[Tensor] = ()
    times: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.trajectory) != len(self.heads):
            raise ValueError(
                f"{len(self.trajectory)} targets do not pair with {len(self.heads)} heads"
            )
        if self.times and len(self.times) != len(self.heads):
            raise ValueError(f"{len(self.times)} times do not pair with {len(self.heads)} heads")


def image_grid(images: Tensor | np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Lay images out row by row, touching; each pixel becomes scale × scale pixels.

    images: float (n, C, H, W) in [-1, 1] (values outside are clipped), C = 1 or 3, n >= 1.
    Returns uint8 (rows*H*scale, columns*W*scale), with a last axis of 3 for C = 3; -1 becomes
    0 and 1 becomes 255, and places beyond the last image stay black.
    ValueError for another shape, a value that is not finite, or columns or scale below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"a grid needs images (n, 1 or 3, H, W), not {tuple(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be at least 1")
    plain = images if isinstance(images, np.ndarray) else images.detach().cpu().float().numpy()
    values = plain.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("the images hold values that are not finite")
    n, channels, height, width = values.shape
    pixels = np.rint((values.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    rows = -(-n // columns)
    canvas = np.zeros((rows * columns, channels, height, width), np.uint8)
    canvas[:n] = pixels
    canvas = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid = canvas.reshape(rows * height, columns * width, channels)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid[:, :, 0] if channels == 1 else grid


def png_bytes(grid: np.ndarray) -> bytes:
    """A PNG file's bytes of uint8 (H, W) or (H, W, 3); ValueError for another array."""
    if grid.dtype != np.uint8 or not (grid.ndim == 2 or (grid.ndim == 3 and grid.shape[2] == 3)):
        raise ValueError(f"a PNG needs uint8 (H, W) or (H, W, 3), not {grid.dtype} {grid.shape}")
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, grid: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, atomically; ValueError for another array."""
    write_bytes(Path(path), png_bytes(grid))


def tile_grid(images: Tensor, columns: int) -> np.ndarray:
    """A grid whose tiles are near TILE pixels: small images grow by a whole factor."""
    size = max(images.shape[-2:])
    if size > LARGEST_TILE:
        import torch

        height, width = (max(1, round(side * LARGEST_TILE / size)) for side in images.shape[-2:])
        images = torch.nn.functional.interpolate(
            images.detach().float(), (height, width), mode="area"
        )
    return image_grid(images, columns, max(1, round(TILE / size)))


def sample_grids(pictures: Pictures) -> dict[str, np.ndarray]:
    """The grids of teacher, student and data, of equally many images."""
    named = {"teacher": pictures.teacher, "student": pictures.student, "data": pictures.data}
    present = {name: images for name, images in named.items() if images is not None}
    count = min(GRID_COLUMNS * GRID_ROWS, *(len(images) for images in present.values()))
    if count > GRID_COLUMNS:
        count -= count % GRID_COLUMNS
    return {
        name: tile_grid(images[:count], min(GRID_COLUMNS, count))
        for name, images in present.items()
    }


def strips_of(images: Sequence[Tensor]) -> list[np.ndarray]:
    """Per image a uint8 strip of its K pictures, all brought to one tile size.

    images: K tensors (m, C, h_k, w_k) as `image_grid` takes them.
    """
    largest = max(max(tensor.shape[-2:]) for tensor in images)
    side = min(LARGEST_TILE, largest * max(1, round(TILE / largest)))
    strips: list[list[np.ndarray]] = [[] for _ in range(len(images[0]))]
    for tensor in images:
        for strip, image in zip(strips, tensor.split(1), strict=True):
            grid = image_grid(image, 1)
            how = Image.Resampling.NEAREST if max(grid.shape[:2]) <= side else Image.Resampling.BOX
            strip.append(np.asarray(Image.fromarray(grid).resize((side, side), how)))
    return [np.concatenate(strip, axis=1) for strip in strips]


def grid_sheet(grids: Mapping[str, np.ndarray]) -> np.ndarray:
    """grid.png: the grids side by side under their names, on white."""
    from PIL import ImageDraw, ImageFont

    height = max(grid.shape[0] for grid in grids.values()) + LABEL + MARGIN
    width = MARGIN + sum(grid.shape[1] + MARGIN for grid in grids.values())
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(18), MARGIN
    for name, grid in grids.items():
        draw.text((left + grid.shape[1] / 2, LABEL / 2), name, "#333", font, anchor="mm")
        sheet.paste(Image.fromarray(grid), (left, LABEL))
        left += grid.shape[1] + MARGIN
    return np.asarray(sheet)


def trajectory_sheet(pictures: Pictures) -> np.ndarray:
    """trajectory.png: per image the teacher's strip above the student's, labelled, on white."""
    from PIL import ImageDraw, ImageFont

    pairs = list(zip(strips_of(pictures.trajectory), strips_of(pictures.heads), strict=True))
    side, width = pairs[0][0].shape[:2]
    left, gap = 90, 3
    block = 2 * side + gap + MARGIN
    size = (left + width + MARGIN, 2 * LABEL + len(pairs) * block)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for k in range(len(pictures.heads)):
        x = left + (k + 0.5) * side
        if pictures.times:
            time = f"t = {pictures.times[k]}" if k == 0 else str(pictures.times[k])
            draw.text((x, LABEL / 2), time, "#333", font, anchor="mm")
        head = f"head {k + 1}"
        draw.text((x, size[1] - LABEL / 2 - MARGIN / 2), head, "#333", font, anchor="mm")
    for row, pair in enumerate(pairs):
        for part, (name, strip) in enumerate(zip(("teacher", "student"), pair, strict=True)):
            top = LABEL + row * block + part * (side + gap)
            draw.text((left - MARGIN, top + side / 2), name, "#333", font, anchor="rm")
            sheet.paste(Image.fromarray(strip), (left, top))
    return np.asarray(sheet)
