"""Reading images: what comes out, and a sentence that names the file where nothing can."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.data.images import (
    DataError,
    ImageSet,
    load_images,
    shipped,
)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(("split", "each"), [("train", 1000), ("test", 200)])
def test_shipped_is_balanced(split: str, each: int) -> None:
    images = shipped(split)  # type: ignore[arg-type]
    assert images.pixels.shape == (10 * each, 1, 28, 28)
    assert images.pixels.dtype == np.uint8
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [each] * 10
    assert (images.channels, images.size, images.num_classes) == (1, 28, 10)
    assert 60 < images.pixels.mean() < 85  # the full set's mean is 72.9


def test_shipped_splits_share_no_image() -> None:
    train = {image.tobytes() for image in shipped("train").pixels}
    assert not train & {image.tobytes() for image in shipped("test").pixels}
    with pytest.raises(ValueError, match="validation"):
        shipped("validation")  # type: ignore[arg-type]


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


def test_float_batch_is_unchanged(draw: np.random.Generator) -> None:
    pixels = draw.uniform(-1, 1, (3, 1, 4, 4)).astype(np.float32)
    got = ImageSet(pixels, None, "three").batch([2, 0]).numpy()
    assert np.array_equal(got, pixels[[2, 0]])


def test_folder_is_sorted_and_recursive(tmp_path: Path) -> None:
    for value, name in enumerate(["b/2.png", "a.png", "b/1.PNG", "c/d/0.png"]):
        _png(tmp_path / name, np.full((8, 8), value, np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"a file manager's leftovers")
    images = load_images(tmp_path)
    assert images.pixels.shape == (4, 1, 8, 8)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 0, 3]
    assert images.labels is None


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name in ("shoe/1.png", "bag/9.png", "shoe/0.png"):
        _png(tmp_path / name, np.zeros((8, 8), np.uint8))
    images = load_images(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("sides", "expected"),
    [([(20, 20)], 20), ([(48, 48)] * 2, 48), ([(48, 48), (70, 50)], 32), ([(300, 300)], 256)],
)
def test_default_size(tmp_path: Path, sides: list[tuple[int, int]], expected: int) -> None:
    for number, (width, height) in enumerate(sides):
        _png(tmp_path / f"{number}.png", np.zeros((height, width, 3), np.uint8))
    assert load_images(tmp_path).pixels.shape == (len(sides), 3, expected, expected)


def test_crop_takes_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    _png(tmp_path / "wide.png", wide)
    assert (load_images(tmp_path, size=4).pixels == 200).all()
    squeezed = load_images(tmp_path, size=4, crop=False).pixels[0, 0]
    assert squeezed[0, 0] < 60 and squeezed[0, 3] < 60 < squeezed[0, 1]


def test_shrinking_averages(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    _png(tmp_path / "checks.png", checks)
    pixels = load_images(tmp_path, size=8).pixels
    assert np.abs(pixels.astype(int) - 127).max() <= 2  # picking single pixels gives 0 or 255


def test_folder_converts_channels(tmp_path: Path) -> None:
    _png(tmp_path / "a.png", np.full((8, 8), 50, np.uint8))
    _png(tmp_path / "b.png", np.full((8, 8, 3), (200, 100, 0), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is greyscale but .*b\.png is RGB"):
        load_images(tmp_path)
    rgb = load_images(tmp_path, channels=3).pixels
    assert rgb[0, :, 0, 0].tolist() == [50, 50, 50]
    assert rgb[1, :, 0, 0].tolist() == [200, 100, 0]
    grey = load_images(tmp_path, channels=1).pixels
    assert grey[:, 0, 0, 0].tolist() == [50, round(0.299 * 200 + 0.587 * 100)]


def test_rare_modes(tmp_path: Path) -> None:
    _png(tmp_path / "deep.png", np.full((8, 8), 65535, np.uint16))
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (10, 20, 30, 255)
    _png(tmp_path / "clear.png", clear)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).quantize(4).save(tmp_path / "palette.png")
    pixels = load_images(tmp_path, channels=3).pixels  # clear, deep, palette
    assert pixels[0, :, 0, 0].tolist() == [10, 20, 30]
    assert pixels[0, :, 7, 7].tolist() == [255, 255, 255]
    assert (pixels[1] == 255).all()
    assert (pixels[2] == 90).all()


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        load_images(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)
    draw = np.random.Generator(np.random.PCG64(0))
    whole = _png(tmp_path / "whole.png", draw.integers(0, 256, (32, 32), np.uint8))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(DataError, match=r"half\.png is not a readable image"):
        load_images(tmp_path)
    (tmp_path / "half.png").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"half\.png is not a readable image"):
        load_images(tmp_path)


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC"])
def test_arrays_in_every_layout(tmp_path: Path, draw: np.random.Generator, layout: str) -> None:
    channels = 1 if layout == "NHW" else 3
    expected = draw.integers(0, 256, (5, channels, 9, 9), np.uint8)
    stored = {
        "NHW": expected[:, 0],
        "NCHW": expected,
        "NHWC": expected.transpose(0, 2, 3, 1),
    }[layout]
    np.save(tmp_path / "a.npy", stored)
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(5))
    assert np.array_equal(load_images(tmp_path / "a.npy").pixels, expected)
    both = load_images(tmp_path / "a.npz")
    assert np.array_equal(both.pixels, expected)
    assert both.labels is not None
    assert both.labels.tolist() == [0, 1, 2, 3, 4]


def test_float_arrays_are_scaled(tmp_path: Path) -> None:
    signed = np.linspace(-1, 1, 32).reshape(2, 4, 4)
    np.save(tmp_path / "signed.npy", signed)
    np.savez(tmp_path / "unsigned.npz", signed / 2 + 0.5, y=np.array([1, 0], np.uint8))
    for name in ("signed.npy", "unsigned.npz"):
        images = load_images(tmp_path / name)
        assert images.pixels.dtype == np.float32
        np.testing.assert_allclose(images.pixels[:, 0], signed, atol=2e-7)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_arrays_are_resized_and_converted(tmp_path: Path, kind: type) -> None:
    array = np.zeros((2, 3, 8, 16), kind)
    array[:, 1] = 1
    np.save(tmp_path / "a.npy", array if kind is np.float32 else array * 255)
    images = load_images(tmp_path / "a.npy", size=4, channels=1)
    assert images.pixels.shape == (2, 1, 4, 4)
    expected = 0.587 * 255 if kind is np.uint8 else 2 * 0.587 - 1
    np.testing.assert_allclose(images.pixels, expected, atol=0.5 if kind is np.uint8 else 1e-6)
    assert load_images(tmp_path / "a.npy").pixels.shape == (2, 3, 8, 8)


def _with_nan() -> np.ndarray:
    array = np.zeros((4, 5, 5), np.float32)
    array[2, 1, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": _with_nan()}, "NaN or infinity, first in image 2"),
        ({"x": np.full((4, 5, 5), 200.0)}, r"floats in \[200, 200\]"),
        ({"x": np.zeros((4, 5, 5), np.int32)}, "int32"),
        ({"x": np.zeros((4, 5))}, r"shape \(4, 5\)"),
        ({"x": np.zeros((4, 2, 5, 5))}, r"shape \(4, 2, 5, 5\)"),
        ({"x": np.zeros((0, 5, 5), np.uint8)}, "holds no images"),
        ({"a": np.zeros((4, 5, 5)), "b": np.zeros((4, 5, 5))}, "found: a, b"),
        ({"x": np.zeros((4, 5, 5)), "y": np.zeros(3, int)}, r"labels of shape \(4,\)"),
        ({"x": np.zeros((4, 5, 5)), "y": np.full(4, 0.5)}, "float64"),
        ({"x": np.zeros((4, 5, 5)), "y": np.full(4, -1)}, "from 0 up"),
        ({"x": np.array([None, None])}, "not a readable array"),
    ],
)
def test_array_errors(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=rf"bad\.npz.*{message}"):
        load_images(tmp_path / "bad.npz")


def test_broken_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=np.zeros((9, 5, 5)))
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in (("cut.npz", whole[:200]), ("text.npy", b"text"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not a readable array"):
            load_images(tmp_path / name)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_file_and_folder(tmp_path: Path, draw: np.random.Generator, zipped: bool) -> None:
    images = draw.integers(0, 256, (6, 7, 7), np.uint8)
    labels = draw.integers(0, 4, 6)
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


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="channels=2"):
        load_images(tmp_path, channels=2)
    with pytest.raises(ValueError, match="size=0"):
        load_images(tmp_path, size=0)
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"table\.csv is neither"):
        load_images(tmp_path / "table.csv")
