"""Data sets of the hub's library, from folders on this disk: `hf:FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, cache, describe, load_images, probe, source
from advkd.train import configure, parser

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked, and nothing is left in the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (6, 3, 8, 8), np.uint8)


def pictures(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]


def rows(pixels: np.ndarray, **columns: Any) -> Any:
    """A data set with a column `image` of these images."""
    found = datasets.Dataset.from_dict({"image": pictures(pixels), **columns})
    return found.cast_column("image", datasets.Image())


def save(found: Any, path: Path) -> str:
    found.save_to_disk(str(path))
    return f"hf:{path}"


def test_a_data_set_that_was_saved(tmp_path: Path, pixels: np.ndarray) -> None:
    found = rows(pixels, label=[0, 1, 2, 0, 1, 2], text=["a"] * 6)
    found = found.cast_column("label", datasets.ClassLabel(names=["cat", "dog", "emu"]))
    name = save(found, tmp_path / "set")
    images = load_images(name)
    assert np.array_equal(images.pixels, pixels)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert describe(images)[:2] == [
        f"{name}: 6 RGB images of 8x8 pixels",
        "3 classes: cat (2), dog (2), emu (2)",
    ]
    both = datasets.DatasetDict({"train": found, "test": found.select([0])})
    assert len(load_images(save(both, tmp_path / "both"), size=4, channels=1)) == 6


def test_a_folder_that_the_library_reads(tmp_path: Path, pixels: np.ndarray) -> None:
    for number, picture in enumerate(pictures(pixels)):
        place = tmp_path / "set" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")
    images = load_images(f"hf:{tmp_path / 'set'}")
    assert np.array_equal(images.pixels, pixels[[0, 2, 4, 1, 3, 5]])
    assert images.classes == ("a", "b")


def test_a_large_one_is_decoded_into_the_cache(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "IN_MEMORY", 0)
    name = save(rows(pixels), tmp_path / "set")
    assert np.array_equal(load_images(name).pixels[:], pixels)
    assert np.array_equal(load_images(name).pixels[:], pixels)
    other = save(rows(pixels[::-1]), tmp_path / "other")
    assert np.array_equal(load_images(other).pixels[:], pixels[::-1])
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1, 2, 0, 1, -1]}, "column label needs labels .* from 0 up"),
        ({"label": [0.5] * 6}, "column label needs labels .* whole numbers"),
    ],
)
def test_labels_are_checked(
    tmp_path: Path, pixels: np.ndarray, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        probe(save(rows(pixels, **columns), tmp_path / "set"))


def test_the_column_of_images(tmp_path: Path, pixels: np.ndarray) -> None:
    two = rows(pixels, mask=pictures(pixels[::-1])).cast_column("mask", datasets.Image())
    assert np.array_equal(load_images(save(two, tmp_path / "two")).pixels, pixels)
    renamed = save(two.rename_column("image", "photo"), tmp_path / "renamed")
    with pytest.raises(DataError, match=r"which column holds the images \(found: photo, mask\)"):
        probe(renamed)


def test_what_cannot_be_used(tmp_path: Path, pixels: np.ndarray) -> None:
    numbers = datasets.Dataset.from_dict({"a": [1, 2]})
    two_splits = datasets.DatasetDict({"a": rows(pixels), "b": rows(pixels)})
    for number, (found, message) in enumerate(
        (
            (numbers, r"which column holds the images \(found: a\)"),
            (two_splits, r"has no split 'train' \(found: a, b\)"),
        )
    ):
        name = save(found, tmp_path / str(number))
        with pytest.raises(DataError, match=rf"{name} .*{message}"):
            probe(name)
    (tmp_path / "none").mkdir()
    rows(pixels[:0]).to_parquet(tmp_path / "none" / "train.parquet")
    (tmp_path / "text").mkdir()
    for name in (f"hf:{tmp_path / 'none'}", f"hf:{tmp_path / 'text'}", "hf:no/such_set"):
        with pytest.raises(DataError, match=f"{name} cannot be loaded: "):
            probe(name)


def test_an_image_that_is_broken_or_gone_is_named(tmp_path: Path, pixels: np.ndarray) -> None:
    place = tmp_path / "set"
    place.mkdir()
    for number, picture in enumerate(pictures(pixels)):
        picture.save(place / f"{number}.png")
    found = probe(f"hf:{place}")
    whole = (place / "3.png").read_bytes()
    (place / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"3\.png is not a readable image"):
        found.load()
    (place / "3.png").unlink()
    with pytest.raises(DataError, match=r"image 3 is '.*3\.png', which is no file"):
        found.load()
    with_bytes = [{"bytes": content, "path": None} for content in (whole, b"no image")]
    column = datasets.Dataset.from_dict({"image": with_bytes}).cast_column(
        "image", datasets.Image()
    )
    with pytest.raises(DataError, match="image 1 is not a readable image"):
        probe(save(column, tmp_path / "bytes"))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:cifar10 needs .* pip install 'advkd\[hf\]'"):
        probe("hf:cifar10")


def test_train_takes_it(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(rows(pixels), tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    config = configure(parser().parse_args(["--data", "hf:set", "--size", "8"]))
    assert (config.name, config.data.path) == ("set", f"hf:{tmp_path / 'set'}")
