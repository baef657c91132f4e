"""Grids, strips and sheets of images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.report.pictures import Pictures, image_grid, save_png


def test_grid_places_images_row_by_row() -> None:
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    grid = image_grid(images, columns=2, scale=2)
    assert grid.dtype == np.uint8 and grid.shape == (8, 12)
    corners = [grid[0, 0], grid[3, 11], grid[4, 0], grid[7, 11]]
    assert corners == [0, 128, 255, 0]  # the last place has no image and is black
    for image, place in zip(images, [(0, 0), (0, 6), (4, 0)], strict=True):
        tile = grid[place[0] : place[0] + 4, place[1] : place[1] + 6]
        assert (tile == tile[0, 0]).all() and tile[0, 0] == round(
            (image[0, 0, 0].item() + 1) * 127.5
        )


def test_grid_keeps_colors_and_orientation() -> None:
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 0, 0, 1] = 1.0  # red, top right
    image[0, 2, 1, 0] = 5.0  # blue, bottom left, beyond the range
    grid = image_grid(image.contiguous(memory_format=torch.channels_last), 1)
    assert grid.tolist() == [[[0, 0, 0], [255, 0, 0]], [[0, 0, 255], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("images", "columns", "scale", "words"),
    [
        (torch.zeros(1, 2, 4, 4), 1, 1, r"\(1, 2, 4, 4\)"),
        (torch.zeros(4, 4), 1, 1, "a grid needs images"),
        (torch.zeros(0, 1, 4, 4), 1, 1, "a grid needs images"),
        (torch.zeros(1, 1, 4, 4), 0, 1, "columns=0"),
        (torch.zeros(1, 1, 4, 4), 1, 0, "scale=0"),
        (torch.full((1, 1, 4, 4), math.nan), 1, 1, "not finite"),
    ],
)
def test_grid_refuses(images: torch.Tensor, columns: int, scale: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        image_grid(images, columns, scale)


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    for shape in ((5, 7), (5, 7, 3)):
        grid = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        save_png(tmp_path / "new" / "grid.png", grid)
        with Image.open(tmp_path / "new" / "grid.png") as image:
            assert np.array_equal(np.asarray(image), grid)
    with pytest.raises(ValueError, match="float64"):
        save_png(tmp_path / "grid.png", np.zeros((5, 7)))
    assert not (tmp_path / "grid.png").exists()


def test_pictures_must_pair() -> None:
    one = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="2 targets do not pair with 1 heads"):
        Pictures(one, one, one, [one, one], [one])
    with pytest.raises(ValueError, match="2 times do not pair with 1 heads"):
        Pictures(one, one, one, [one], [one], (5, 0))
