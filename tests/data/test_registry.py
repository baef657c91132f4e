"""Data sets by name and by folder, and their descriptions checked key by key."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.data import (
    DataError,
    dataset,
    dataset_names,
    describe,
    find,
    for_shape,
    load_images,
    probe,
)
from advkd.data.registry import default_dataset, for_teacher

TOML = """\
title = "Toys"
size = 8
channels = 3
classes = ["ball", "cube"]
license = "CC0"
flip = false
features = "features"

[splits]
train = "train.npz"
test = "test.npz"
"""


def make_toys(folder: Path, text: str = TOML, labels: tuple[int, ...] = (0, 1, 1, 0)) -> Path:
    """Make the folder of a small data set."""
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_text(text)
    for split, value in (("train", 10), ("test", 20)):
        pixels = np.full((len(labels), 8, 8, 3), value, np.uint8)
        np.savez(folder / f"{split}.npz", images=pixels, labels=np.array(labels))
    return folder


def test_the_data_sets_that_ship() -> None:
    assert dataset_names() == ["avatars", "fashion-mnist"]
    faces = dataset("avatars")
    assert (faces.shape, faces.flip, faces.license) == ((32, 3), False, "CC0-1.0")
    assert faces.classes == ("pixel-art", "open-peeps", "lorelei")
    assert for_shape(32, 3) == faces and for_shape(32, 1) is None
    assert (faces.folder / "LICENSE").is_file() and (faces.folder / "make.mjs").is_file()
    assert describe(probe("avatars")) == [
        "Avatars (train): 10,500 RGB images of 32x32 pixels",
        "3 classes: pixel-art (3,500), open-peeps (3,500), lorelei (3,500)",
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("zoo:avatars", "avatars"),
        ("zoo:avatars-large", "avatars"),
        ("zoo:fashion-mnist", "fashion-mnist"),
        ("zoo:fashion-mnist-2", "fashion-mnist"),
        ("zoo:avatarsque", None),
        ("zoo:fashion", None),
        ("zoo:x", None),
        ("zoo:", None),
        ("avatars", None),
        ("/runs/avatars", None),
        ("", None),
    ],
)
def test_a_teacher_that_ships_names_its_data_set(source: str, name: str | None) -> None:
    found = for_teacher(source)
    assert (found and found.name) == name


def test_what_lies_in_the_working_folder_is_not_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fashion-mnist").mkdir()
    make_toys(tmp_path / "more" / "avatars")
    monkeypatch.setenv("ADVKD_DATASETS", str(tmp_path / "more"))
    monkeypatch.chdir(tmp_path)
    assert find("fashion-mnist") is None
    assert default_dataset().title == "Fashion-MNIST"
    faces = for_teacher("zoo:avatars")
    assert faces is not None and faces.title == "Avatars"


def test_the_shipped_data_set_is_described() -> None:
    shipped = dataset("fashion-mnist")
    assert (shipped.size, shipped.channels, shipped.flip, shipped.license) == (28, 1, False, "MIT")
    assert shipped.classes[0] == "T-shirt/top" and len(shipped.classes) == 10
    assert shipped.features_source == "zoo:fashion-mnist-features"
    assert for_shape(28, 1) == shipped
    assert for_shape(28, 3) is None
    assert load_images("fashion-mnist").classes == shipped.classes
    assert describe(probe("fashion-mnist"))[0] == (
        "Fashion-MNIST (train): 10,000 grayscale images of 28x28 pixels"
    )


def test_a_data_set_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/data.md: a folder, a dataset.toml, and ADVKD_DATASETS."""
    make_toys(tmp_path / "mine" / "toys")
    (tmp_path / "empty").mkdir()
    paths = os.pathsep.join(map(str, (tmp_path / "empty", tmp_path / "gone", tmp_path / "mine")))
    assert find("toys") is None
    monkeypatch.setenv("ADVKD_DATASETS", paths)
    assert dataset_names() == ["avatars", "fashion-mnist", "toys"]
    toys = dataset("toys")
    assert (toys.name, toys.title, toys.size, toys.flip) == ("toys", "Toys", 8, False)
    assert for_shape(8, 3) == toys
    train, test = toys.train(), toys.test()
    assert (train.pixels == 10).all() and (test.pixels == 20).all()
    assert train.classes == ("ball", "cube")
    assert describe(train)[:2] == [
        "Toys (train): 4 RGB images of 8x8 pixels",
        "2 classes: ball (2), cube (2)",
    ]
    assert toys.features_source == str(tmp_path / "mine/toys/features")
    assert np.array_equal(load_images("toys").pixels, train.pixels)


def test_the_documented_description(tmp_path: Path) -> None:
    """The dataset.toml that docs/data.md shows, with the folders that it names."""
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    (tmp_path / "dataset.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    for name in ("train/ball/1.png", "train/cube/1.png", "test/cube/1.png", "test/ball/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    toys = dataset(tmp_path)
    assert toys.classes == ("ball", "cube")
    assert toys.train().pixels.shape == (2, 3, 32, 32)
    test = toys.test()
    assert test.labels is not None
    assert test.labels.tolist() == [0, 1]


def test_a_path_to_a_data_set_serves_too(tmp_path: Path) -> None:
    folder = make_toys(tmp_path / "toys")
    assert dataset(folder).folder == folder
    assert (load_images(folder).pixels == 10).all()
    assert load_images(folder, size=4, channels=1).pixels.shape == (4, 1, 4, 4)
    assert find(tmp_path) is None
    with pytest.raises(DataError, match="there is no data set 'toyz'; the nearest is"):
        dataset("toyz")


def test_folders_are_labelled_by_the_list_of_classes(tmp_path: Path) -> None:
    """A split that lacks a class, and an order that is not the alphabet's."""
    text = TOML.replace('["ball", "cube"]', '["cube", "ball", "arch"]').replace(".npz", "")
    folder = make_toys(tmp_path / "toys", text)
    for name in ("train/ball/1.png", "train/cube/1.png", "test/cube/1.png", "test/arch/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    toys = dataset(folder)
    for images, labels in ((toys.train(), [1, 0]), (toys.test(), [2, 0])):
        assert images.labels is not None
        assert images.labels.tolist() == labels
        assert images.num_classes == 3
    (folder / "test/arch").rename(folder / "test/arc")
    with pytest.raises(DataError, match=r"'arc', which is no class of .*; the nearest is 'arch'"):
        toys.open("test")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 8", "sice = 8", "unknown key 'sice'; the nearest is 'size'"),
        ("size = 8", "", "lacks the key 'size'"),
        ("size = 8", "size = 0", "size=0"),
        ("size = 8", "size = 99999", "size=99999"),
        ("size = 8", 'size = "8"', "'size' is of type int"),
        ("channels = 3", "channels = 2", "channels=2 is neither 1 nor 3"),
        ('["ball", "cube"]', '["ball"]', "two names at least"),
        ('["ball", "cube"]', '["ball", "ball"]', "each once"),
        ('["ball", "cube"]', '["ball", 3]', "'classes' is of type str"),
        ('["ball", "cube"]', '["ball", ""]', "not of 1 to 255 characters"),
        ('["ball", "cube"]', f'["ball", "{"a" * 256}"]', "not of 1 to 255 characters"),
        ('train = "train.npz"', "", "lacks the key 'splits.train'"),
        ('train = "train.npz"', 'trian = "a"', "unknown key 'splits.trian'; the nearest is"),
        ("train.npz", "/etc", "splits.train='/etc' leaves the data set's folder"),
        ("test.npz", "../x", "splits.test='../x' leaves the data set's folder"),
        ('"features"', '"../x"', "features='../x' leaves"),
        ("flip = false", "flip = 0", "'flip' is of type bool"),
        ("flip = false", "flip = ", "Invalid value"),
        ("flip = false", "x = " + "[" * 5000, "recursion"),
        ("flip = false", "#" * (1 << 20), "more than 1,048,576 bytes"),
    ],
)
def test_descriptions_are_checked(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    folder = make_toys(tmp_path / "toys", TOML.replace(old, new))
    for read in (dataset, load_images):
        with pytest.raises(DataError, match=rf"toys/dataset\.toml cannot be used: .*{message}"):
            read(folder)


def test_descriptions_that_are_no_text(tmp_path: Path) -> None:
    folder = make_toys(tmp_path / "toys")
    (folder / "dataset.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"dataset\.toml cannot be used"):
        dataset(folder)
    (folder / "dataset.toml").write_bytes(b"\xef\xbb\xbf" + TOML.encode())
    assert dataset(folder).title == "Toys"


def test_splits_must_hold_what_the_description_says(tmp_path: Path) -> None:
    toys = dataset(make_toys(tmp_path / "a", labels=(0, 1, 2, 1)))
    with pytest.raises(DataError, match=r"train\.npz has the label 2, but .*names 2 classes"):
        toys.train()
    np.savez(toys.folder / "train.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"train\.npz has no labels for the 2 classes"):
        toys.train()
    (toys.folder / "test.npz").unlink()
    with pytest.raises(DataError, match=r"dataset\.toml names .*test\.npz, which does not exist"):
        toys.test()
    untested = dataset(make_toys(tmp_path / "b", TOML.replace('test = "test.npz"', "")))
    with pytest.raises(DataError, match="names no test split"):
        untested.test()


def test_labels_need_classes(tmp_path: Path) -> None:
    """Labels of two splits may mean different things where no list settles them."""
    text = TOML.replace('classes = ["ball", "cube"]', "")
    images = dataset(make_toys(tmp_path / "toys", text)).train()
    assert images.labels is None
    assert images.notes == ("labels are left out, since dataset.toml lists no classes",)
