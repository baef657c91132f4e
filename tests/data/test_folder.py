"""Folders: which files are read, as which classes, and that nothing is passed over in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, load_images, probe


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def save_all(folder: Path, *names: str) -> Path:
    """Save one small image under every name."""
    for name in names:
        save(folder / name, np.zeros((8, 8), np.uint8))
    return folder


def test_folder_is_sorted_and_recursive(tmp_path: Path) -> None:
    for value, name in enumerate(["b/2.png", "a.png", "b/1.PNG", "c/d/0.png"]):
        save(tmp_path / name, np.full((8, 8), value, np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"a file manager's leftovers")
    images = load_images(tmp_path)
    assert images.pixels.shape == (4, 1, 8, 8)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 0, 3]
    assert images.labels is None


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name in ("shoe/1.png", "bag/9.png", "shoe/0.png"):
        save(tmp_path / name, np.zeros((8, 8), np.uint8))
    images = load_images(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("sides", "expected"),
    [([(20, 20)], 20), ([(48, 48)] * 2, 48), ([(48, 48), (70, 50)], 32), ([(300, 300)], 256)],
)
def test_default_size(tmp_path: Path, sides: list[tuple[int, int]], expected: int) -> None:
    for number, (width, height) in enumerate(sides):
        save(tmp_path / f"{number}.png", np.zeros((height, width, 3), np.uint8))
    assert load_images(tmp_path).pixels.shape == (len(sides), 3, expected, expected)


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        load_images(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)
    generator = np.random.Generator(np.random.PCG64(0))
    whole = save(tmp_path / "whole.png", generator.integers(0, 256, (32, 32), np.uint8))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(DataError, match=r"half\.png is not a readable image"):
        load_images(tmp_path)
    (tmp_path / "half.png").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"half\.png is not a readable image"):
        load_images(tmp_path)


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    names = ("cat/1.png", "dog/1.png", "dog/2.png", ".git/x.png", "__MACOSX/cat/1.png", ".a.png")
    save_all(tmp_path, *names, "cat/.ipynb_checkpoints/1.png", "dog/@eaDir/1.png")
    for name in ("labels.csv", "dog/a.TXT", "dog/b.txt", "README"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "pipe.png")
    images = load_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    passed = next(note for note in images.notes if note.startswith("passed over"))
    for words in (
        "hidden or system folders (4)",
        "hidden files (1)",
        ".csv files (1)",
        ".txt files (2)",
        "files without a suffix (1)",
        "broken links and special files (3)",
    ):
        assert words in passed


def test_runs_are_no_images_to_learn_from(tmp_path: Path) -> None:
    save_all(tmp_path, "1.png", "runs/a/preview.png", "runs/a/report/grid.png", "config/2.png")
    for folder, text in (("runs/a", "format = 2\nname = "), ("config", "title = ")):
        (tmp_path / folder / "config.toml").write_text(text)
    images = load_images(tmp_path)
    assert len(images) == 2 and "folders of runs (1)" in images.notes[0]
    assert len(load_images(tmp_path / "runs" / "a")) == 2  # asked for by name


def test_many_kinds_are_summed_up(tmp_path: Path) -> None:
    save_all(tmp_path, "1.png")
    for i in range(40):
        (tmp_path / f"a.x{i}").touch()
    (note,) = load_images(tmp_path).notes
    assert note.endswith("others (28)")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(DataError, match=r"holds no images; passed over: \.heic files \(1\)"):
        load_images(tmp_path)


def test_links_are_followed_once(tmp_path: Path) -> None:
    data, other = save_all(tmp_path / "d", "a/1.png"), save_all(tmp_path / "other", "b/2.png")
    save_all(tmp_path, "beside.png")
    (data / "b").symlink_to(other / "b")  # a folder that lies elsewhere
    (data / "0").symlink_to(data / "a")  # comes first by name, and is no class beside the real one
    (data / "a/loop").symlink_to(data)
    (data / "up").symlink_to(tmp_path)  # would bring in what lies beside
    (other / "b/back").symlink_to(other)
    images = load_images(data)
    assert images.classes == ("a", "b")
    assert len(images) == 2
    assert images.notes == ("passed over: links to folders that are read already (4)",)


@pytest.mark.parametrize(
    ("names", "count", "classes", "left_out"),
    [
        (("train/1.png", "test/1.png"), 1, None, "test (1)"),
        (("train/a/1.png", "train/b/1.png", "val/a/1.png"), 2, ("a", "b"), "val (1)"),
        (("Training/a/1.png", "Training/b/1.png", "valid/1.png"), 2, ("a", "b"), "valid (1)"),
        (("x/train/a/1.png", "x/train/b/1.png", "x/test/2.png"), 2, ("a", "b"), "x/test (1)"),
        (("train/1.png", "validation/1.png", "a.png"), 1, None, "a.png (1), validation (1)"),
        (("train_images/1.png", "test_images/1.png"), 1, None, "test_images (1)"),
        (
            ("cat/train/1.png", "cat/test/1.png", "dog/train/1.png", "dog/val/1.png"),
            2,
            ("cat", "dog"),
            "cat/test (1), dog/val (1)",
        ),
        (
            ("train/train/1.png", "train/bus/1.png", "test/train/1.png"),
            2,
            ("bus", "train"),
            "test (1)",
        ),
        (("train/1.png", "bus/1.png"), 2, ("bus", "train"), None),  # vehicles
        (("train/a/1.png", "train/b/1.png"), 2, ("a", "b"), None),
        (("contest/1.png", "latest/1.png"), 2, ("contest", "latest"), None),
    ],
)
def test_splits_are_no_classes(
    tmp_path: Path,
    names: tuple[str, ...],
    count: int,
    classes: tuple[str, ...] | None,
    left_out: str | None,
) -> None:
    images = load_images(save_all(tmp_path, *names))
    assert (len(images), images.classes) == (count, classes)
    found = [note.split("left out: ")[1] for note in images.notes]
    assert [sorted(note.split(", ")) for note in found] == (
        [] if left_out is None else [left_out.split(", ")]
    )


def test_held_out_splits_alone_are_refused(tmp_path: Path) -> None:
    save_all(tmp_path, "test/1.png", "val/1.png")
    with pytest.raises(DataError, match="holds test and val but no train: name the one to read"):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "test")) == 1


def test_files_at_several_levels_have_no_classes(tmp_path: Path) -> None:
    assert load_images(save_all(tmp_path, "a/1.png", "b/c/1.png")).labels is None


def test_one_stray_image_does_not_shrink_the_others(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"{number}.png", np.zeros((16, 16), np.uint8))
    stray = save(tmp_path / "pixel.gif", np.zeros((1, 1), np.uint8))
    with pytest.raises(DataError, match=r"pixel\.gif has only 1x1 pixels where half .* have 16"):
        probe(tmp_path, channels=1)
    assert load_images(tmp_path, size=16, channels=1).pixels.shape == (6, 1, 16, 16)
    stray.unlink()
    save(tmp_path / "a.png", np.zeros((14, 18), np.uint8))
    images = load_images(tmp_path)
    assert images.size == 14
    assert images.notes == (
        "resized from 16x16 to 18x14 pixels to 14x14; the center of what is not square is cut out",
    )
