"""Zips of images, with the labels of a dataset.json: read whole, or refused by a sentence."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, load_images, probe, zipped


def png(image: np.ndarray) -> bytes:
    """An image (C, H, W) as a PNG."""
    file = io.BytesIO()
    pixels = image.transpose(1, 2, 0)
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def name_of(number: int) -> str:
    return f"{number // 1000:05d}/img{number:08d}.png"


def write_zip(
    path: Path,
    images: np.ndarray,
    broken: dict[int, bytes] | None = None,
    index: Any = None,
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """Write images (N, C, H, W) as EDM's dataset_tool does; `index` is the dataset.json."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, image in enumerate(images):
            archive.writestr(name_of(number), (broken or {}).get(number) or png(image))
        if index is not None:
            content = index if isinstance(index, str) else json.dumps(index)
            archive.writestr("dataset.json", content)
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (6, 3, 8, 8), np.uint8)


LABELS = {"labels": [[name_of(number), number % 3] for number in range(6)]}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wide", [False, True])
def test_images_and_labels(
    tmp_path: Path, pixels: np.ndarray, method: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:  # sizes and places in fields of 64 bits, as where an archive has more than 4 GiB
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    path = write_zip(tmp_path / "a.zip", pixels, index=LABELS, method=method)
    source = probe(path)
    assert (len(source), source.size, source.channels, source.num_classes) == (6, 8, 3, 3)
    images = source.load()
    assert np.array_equal(images.pixels, pixels)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.classes is None
    assert images.notes == ("dataset.json gives the labels",)


def test_a_zip_is_read_as_the_folder_that_it_was(tmp_path: Path, pixels: np.ndarray) -> None:
    places = (
        *("train/cat/1.png", "train/dog/2.PNG", "test/1.png", ".x.png"),
        *("__MACOSX/train/cat/1.png", "notes.txt"),
    )
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for place, image in zip(places, pixels, strict=True):
            archive.writestr(place, png(image))
            (tmp_path / "a" / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / place).write_bytes(png(image))
        archive.mkdir("empty")
    ours, theirs = load_images(tmp_path / "a.zip"), load_images(tmp_path / "a")
    assert np.array_equal(ours.pixels, theirs.pixels) and len(ours) == 2
    assert ours.classes == theirs.classes == ("cat", "dog")
    words = [sorted(", ".join(images.notes).split(", ")) for images in (ours, theirs)]
    assert [word.removeprefix("passed over: ") for word in words[0]] == [
        word.removeprefix("passed over: ") for word in words[1]
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_unlabeled_sets_of_the_tool_have_no_classes(
    tmp_path: Path, pixels: np.ndarray, packed: bool
) -> None:
    names = [f"{number % 2:05d}/{number}.png" for number in range(6)]
    for index, expected in (
        ({"labels": None}, None),
        ({"labels": [[name, 4 - i // 2] for i, name in enumerate(names)]}, [4, 3, 2, 4, 3, 2]),
        ({"about": "something else"}, [0, 0, 0, 1, 1, 1]),
    ):
        path = tmp_path / ("a.zip" if packed else "a")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name, image in zip(names, pixels, strict=True):
                archive.writestr(name, png(image))
            archive.writestr("dataset.json", json.dumps(index))
            archive.extractall(tmp_path / "a")
        labels = load_images(path).labels
        assert labels is None if expected is None else labels.tolist() == expected


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"labels": LABELS["labels"][:5]}, r"gives no label for 00000/img00000005\.png"),
        ({"labels": [*LABELS["labels"], ["b.png", 1]]}, r"names b\.png, which is not there"),
        ({"labels": [*LABELS["labels"], [name_of(2), 1]]}, r"img00000002\.png two labels"),
        ({"labels": [[name_of(0), 0.5]]}, r"img00000000\.png the label 0\.5, which is no whole"),
        ({"labels": [[name_of(0), [0, 1]]]}, r"the label \[0, 1\], which is no whole number"),
        ({"labels": [[name_of(0), True]]}, "the label True, which is no whole number"),
        ({"labels": [[name_of(0), None]]}, "the label None, which is no whole number"),
        ({"labels": [[name_of(0), 2**70]]}, "which is no whole number"),
        ({"labels": [[name_of(i), -1] for i in range(6)]}, "whole numbers from 0 up"),
        ({"labels": [[name_of(i), 10**6] for i in range(6)]}, "has the label 1000000"),
        ({"labels": {"a": 1}}, "holds no list of labels"),
        ({"labels": [["a.png"]]}, r"holds \['a\.png'\] instead of \[name, label\]"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"labels": [' + " " * (2 << 20) + "]}", "too large"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, pixels: np.ndarray, index: Any, message: str
) -> None:
    path = write_zip(tmp_path / "a.zip", pixels, index=index, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=rf"a\.zip/dataset\.json .*{message}"):
        probe(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "a")
    with pytest.raises(DataError, match=rf"a/dataset\.json .*{message}"):
        probe(tmp_path / "a")


def test_archives_that_are_cut_or_damaged(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_zip(tmp_path / "a.zip", pixels)
    whole = path.read_bytes()
    for end in (30, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"a\.zip is not a whole zip archive"):
            load_images(path)
    at = whole.index(b"IDAT") + 9
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"a\.zip/00000/img00000000\.png is cut or damaged"):
        load_images(path)
    path.write_bytes(whole[:4] + b"\xff" * 30 + whole[34:])
    with pytest.raises(DataError, match=r"a\.zip"):
        load_images(path)


def test_archives_that_claim_too_much(tmp_path: Path, pixels: np.ndarray) -> None:
    bomb = {2: bytes(100 << 20)}
    path = write_zip(tmp_path / "a.zip", pixels, bomb, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"img00000002\.png asks for 104,857,600 bytes, which a"):
        probe(path)
    claims = bytearray(png(pixels[0]))  # 64 million pixels, vouched for by zeros behind the image
    claims[16:24] = (8000).to_bytes(4, "big") * 2
    path = write_zip(path, pixels, {2: bytes(claims) + bytes(2 << 20)}, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"img00000002\.png is not a readable image"):
        load_images(path, size=8, channels=3)


def test_members_that_are_not_read(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_zip(tmp_path / "a.zip", pixels, method=zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match=r"img00000000\.png is encrypted, or packed in a way"):
        probe(path)
    path = write_zip(tmp_path / "a.zip", pixels)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # encrypted, says the directory
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"img00000000\.png is encrypted"):
        probe(path)


def test_images_of_several_shapes(tmp_path: Path, pixels: np.ndarray) -> None:
    gray = {3: png(pixels[3, :1])}
    with pytest.raises(DataError, match=r"a\.zip/\S+0\.png is RGB but \S+3\.png is grayscale"):
        probe(write_zip(tmp_path / "a.zip", pixels, gray))
    wide = {3: png(np.zeros((3, 8, 20), np.uint8))}
    images = load_images(write_zip(tmp_path / "a.zip", pixels, wide))
    assert images.pixels.shape == (6, 3, 8, 8)
    assert "resized from 8x8 to 20x8 pixels" in images.notes[-1]


def test_arrays_in_an_archive_of_another_name(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=pixels)
    (tmp_path / "a.npz").rename(tmp_path / "a.zip")
    assert np.array_equal(load_images(tmp_path / "a.zip").pixels, pixels)


def test_the_file_is_closed(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_zip(tmp_path / "a.zip", pixels)
    archive = zipped.Archive(path)
    assert archive.read(1) == png(pixels[1])
    descriptor = archive._file
    del archive
    with pytest.raises(OSError):
        zipped.os.fstat(descriptor)
