"""IDX files, gzipped or not, recognized by their content."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, load_images, probe


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_file_and_folder(tmp_path: Path, generator: np.random.Generator, zipped: bool) -> None:
    images = generator.integers(0, 256, (6, 7, 7), np.uint8)
    labels = generator.integers(0, 4, 6)
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(_idx(images)))
    (tmp_path / f"t10k-images-idx3-ubyte{end}").write_bytes(pack(_idx(images[:2])))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(_idx(labels)))
    for path in (tmp_path, tmp_path / f"train-images-idx3-ubyte{end}"):
        got = load_images(path)
        assert np.array_equal(got.pixels[:, 0], images)
        assert got.labels is not None
        assert np.array_equal(got.labels, labels)
    held_out = load_images(tmp_path / f"t10k-images-idx3-ubyte{end}", size=14, channels=3)
    assert held_out.pixels.shape == (2, 3, 14, 14)
    assert held_out.labels is None


def test_idx_errors(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte"
    whole = _idx(np.zeros((6, 7, 7)))
    for content, message in (
        (b"", "not an IDX file"),
        (whole[:-1], "293 bytes where its header asks for 294"),
        (whole[:7], "not an IDX file"),
        (bytes([0, 0, 13]) + whole[3:], "unsigned bytes"),
        (gzip.compress(whole)[:-9], "cannot be read"),
        (_idx(np.zeros((0, 7, 7))), "holds no images"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"images-idx3-ubyte.*{message}"):
            load_images(path)
    path.write_bytes(whole)
    (tmp_path / "labels-idx1-ubyte").write_bytes(_idx(np.zeros(5)))
    with pytest.raises(DataError, match=r"labels-idx1-ubyte needs labels of shape \(6,\)"):
        load_images(path)
    (tmp_path / "other-images-idx3-ubyte").write_bytes(whole)
    with pytest.raises(DataError, match="images-idx3-ubyte and other-images-idx3-ubyte"):
        load_images(tmp_path)


def test_only_content_makes_an_idx_file(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "patch_idx3.png")
    (tmp_path / "notes-idx3.txt").write_text("no image")
    (tmp_path / "labels").write_bytes(_idx(np.zeros(5)))
    assert len(load_images(tmp_path)) == 1
    (tmp_path / "pictures").write_bytes(_idx(np.ones((5, 4, 4))))
    for path in (tmp_path, tmp_path / "pictures"):
        assert load_images(path).pixels.shape == (5, 1, 4, 4)
    assert "pictures is read" in load_images(tmp_path).notes[0]
    assert "of 4 files" in load_images(tmp_path).notes[0]


def test_a_broken_idx_file_is_named_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"broken")
    with pytest.raises(DataError, match="train-images-idx3-ubyte is not an IDX file"):
        load_images(tmp_path)


def test_a_name_without_images_has_no_labels_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(_idx(np.zeros((3, 4, 4)))))
    assert load_images(tmp_path / "a.gz").labels is None


def test_headers_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte"
    claims = bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**32 - 1] * 3)
    bomb = gzip.compress(_idx(np.zeros((70_000, 32, 32))), compresslevel=1)
    assert len(bomb) < 350_000
    for content in (claims, gzip.compress(claims + bytes(1 << 20)), bomb):
        path.write_bytes(content)
        with pytest.raises(DataError, match="does not vouch for"):
            probe(path)
    path.write_bytes(gzip.compress(_idx(np.zeros((3, 4, 4))) + bytes(1 << 20)))
    with pytest.raises(DataError, match="holds more than the 48 bytes"):
        load_images(path)


def test_labels_beside_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "images-idx3-ubyte").write_bytes(_idx(np.zeros((6, 7, 7))))
    (tmp_path / "labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + struct.pack(">I", 2**32 - 1) + bytes(6)
    )
    with pytest.raises(DataError, match="labels-idx1-ubyte asks for 4,294,967,295 bytes"):
        probe(tmp_path)


def test_a_gzipped_copy_beside_is_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_idx(np.zeros((3, 4, 4))))
    (tmp_path / "a.gz").write_bytes(gzip.compress(_idx(np.zeros((3, 4, 4)))))
    assert load_images(tmp_path / "a").labels is load_images(tmp_path / "a.gz").labels is None
