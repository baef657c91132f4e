"""The front door: sets in memory, probing, and what is said of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.data import DataError, ImageSet, dataset, describe, load_images, probe


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


@pytest.mark.parametrize(("split", "each"), [("train", 1000), ("test", 200)])
def test_shipped_is_balanced(split: str, each: int) -> None:
    images = dataset("fashion-mnist").open(split).load()  # type: ignore[arg-type]
    assert images.pixels.shape == (10 * each, 1, 28, 28)
    assert images.pixels.dtype == np.uint8
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [each] * 10
    assert (images.channels, images.size, images.num_classes) == (1, 28, 10)
    assert 60 < images.pixels.mean() < 85  # the full set's mean is 72.9


@pytest.mark.parametrize("name", ["avatars", "fashion-mnist"])
def test_shipped_splits_share_no_image(name: str) -> None:
    shipped = dataset(name)
    train = {image.tobytes() for image in shipped.train().pixels}
    assert not train & {image.tobytes() for image in shipped.test().pixels}


@pytest.mark.parametrize(("split", "each"), [("train", 3500), ("test", 700)])
def test_avatars_are_balanced_and_all_different(split: str, each: int) -> None:
    images = dataset("avatars").open(split).load()  # type: ignore[arg-type]
    assert images.pixels.shape == (3 * each, 3, 32, 32) and images.pixels.dtype == np.uint8
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [each] * 3
    assert np.bincount(images.labels[:300], minlength=3).min() > 70  # in mixed order
    assert len({image.tobytes() for image in images.pixels}) == 3 * each


def test_batch_scales_and_flips() -> None:
    pixels = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
    pixels[0, 0, 0] = (0, 255)
    images = ImageSet(pixels, None, "two")
    x = images.batch([0, 1, 0], np.array([False, False, True]))
    assert x.dtype == torch.float32
    assert x.shape == (3, 3, 2, 2)
    assert x[0, 0, 0].tolist() == [-1.0, 1.0]
    torch.testing.assert_close(x[2], x[0].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(x[1], torch.from_numpy(pixels[1] / np.float32(127.5) - 1))
    assert pixels[0, 0, 0].tolist() == [0, 255]  # the set itself is not flipped
    assert images.batch(np.array([], np.int64)).shape == (0, 3, 2, 2)


def test_float_batch_is_unchanged(generator: np.random.Generator) -> None:
    pixels = generator.uniform(-1, 1, (3, 1, 4, 4)).astype(np.float32)
    got = ImageSet(pixels, None, "three").batch([2, 0]).numpy()
    assert np.array_equal(got, pixels[[2, 0]])


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="channels=2"):
        load_images(tmp_path, channels=2)
    with pytest.raises(ValueError, match="size=0"):
        load_images(tmp_path, size=0)
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"table\.csv is neither"):
        load_images(tmp_path / "table.csv")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(DataError, match=r"pipe\.npy is neither"):
        load_images(tmp_path / "pipe.npy")
    with pytest.raises(DataError, match=r"one\.png is one image: name the folder"):
        load_images(tmp_path / "one.png")
    for path in (tmp_path / "gone", tmp_path / ("x" * 5000), "fashion_mnist"):
        nearest = "fashion-mnist" if path == "fashion_mnist" else ""
        with pytest.raises(DataError, match=f"does not exist.*the nearest is '{nearest}"):
            load_images(path)


def test_probe_reads_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1", "a/2", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 48)).save(tmp_path / f"{name}.png")
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 12, 16), np.uint8), labels=np.arange(9) % 2)
    with monkeypatch.context() as context:
        context.setattr(Image.Image, "load", lambda image: pytest.fail("pixels were read"))
        folder, array = probe(tmp_path), probe(tmp_path / "a.npz", size=8, channels=3)
    assert (len(folder), folder.size, folder.channels, folder.num_classes) == (3, 32, 3, 2)
    assert (len(array), array.size, array.channels, array.num_classes) == (9, 8, 3, 2)
    for found in (folder, array):
        loaded = found.load()
        assert loaded.pixels.shape == (len(found), found.channels, found.size, found.size)
        assert describe(found) == describe(loaded)
        assert loaded.labels is not None and found.labels is not None
        assert np.array_equal(found.labels, loaded.labels)


def test_describe_names_every_class() -> None:
    pixels = np.zeros((5, 1, 8, 8), np.uint8)
    labels = np.array([0, 2, 2, 0, 0])
    named = ImageSet(pixels, labels, "garments", ("bag", "coat", "shoe"), ("a note",))
    first, classes = "garments: 5 grayscale images of 8x8 pixels", "bag (3), coat (0), shoe (2)"
    assert describe(named) == [first, f"3 classes: {classes}", "a note"]
    assert describe(ImageSet(pixels, None, "garments")) == [first, "no classes"]
    assert describe(ImageSet(pixels, labels, "garments"))[1] == "3 classes: 0 (3), 1 (0), 2 (2)"
    odd = ImageSet(pixels, labels, "odd", ("a\nb", "\udcff", "x" * 500))
    assert describe(odd)[1] == rf"3 classes: a\nb (3), \udcff (0), {'x' * 60}... (2)"
    many = ImageSet(np.zeros((300, 1, 1, 1), np.uint8), np.arange(300), "many")
    assert "199 (1), and 100 more (1 to 1 images each)" in describe(many)[1]


def test_subset_keeps_classes() -> None:
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    images = ImageSet(pixels, np.array([0, 1, 2, 1, 0]), "five", ("a", "b", "c"), ("a note",))
    part = images.subset(np.array([3, 0]))
    assert part.pixels[:, 0, 0, 0].tolist() == [3, 0]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert (part.classes, part.num_classes, part.notes) == (("a", "b", "c"), 3, ("a note",))
    assert ImageSet(pixels, None, "five").subset([1]).labels is None
