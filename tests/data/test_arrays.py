"""NumPy's files: every layout, and nothing evaluated, unpickled or believed beyond its bytes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from advkd.data import DataError, describe, load_images, probe


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC"])
def test_arrays_in_every_layout(
    tmp_path: Path, generator: np.random.Generator, layout: str
) -> None:
    channels = 1 if layout == "NHW" else 3
    expected = generator.integers(0, 256, (5, channels, 9, 9), np.uint8)
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


@pytest.mark.parametrize(
    ("names", "passed"),
    [
        (("arr_0", "arr_1"), None),
        (("x_train", "y_train", "x_test", "y_test"), "x_test, y_test"),
        (("train_images", "train_labels", "val_images"), "val_images"),
        (("imgs", "labels", "latents"), "latents"),
    ],
)
def test_known_names(tmp_path: Path, names: tuple[str, ...], passed: str | None) -> None:
    stored = [np.full((6, 5, 5), 9, np.uint8), np.arange(6)[:, None] % 3]
    others = [np.zeros((2, 5), np.uint8) if "lat" in name else stored[0] for name in names[2:]]
    np.savez(tmp_path / "a.npz", **dict(zip(names, [*stored, *others], strict=True)))
    images = load_images(tmp_path / "a.npz")
    assert (images.pixels == 9).all()
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert describe(images)[1] == "3 classes: 0 (2), 1 (2), 2 (2)"
    assert images.notes == ((f"arrays passed over: {passed}",) if passed else ())


def test_a_second_array_of_images_is_not_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((6, 5, 5)), np.zeros((6, 5, 5)))
    images = load_images(tmp_path / "a.npz")
    assert images.labels is None
    assert images.notes == ("arrays passed over: arr_1",)


@pytest.mark.parametrize(
    ("label", "classes"),
    [(10**12, "1000000000001 classes"), (1000, "at most 1000"), (2**64 - 1, f"{2**64} classes")],
)
def test_labels_are_bounded(tmp_path: Path, label: int, classes: str) -> None:
    labels = np.array([0, 1, label, 1], np.uint64)
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(DataError, match=rf"a\.npz has the label {label}.*{classes}"):
        load_images(tmp_path / "a.npz")
    labels[2] = 999
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    assert load_images(tmp_path / "a.npz").num_classes == 1000


def test_fortran_order_and_byte_order(tmp_path: Path, generator: np.random.Generator) -> None:
    array = generator.uniform(-1, 1, (4, 3, 5, 5))
    for stored in (np.asfortranarray(array), array.astype(">f8"), array.astype("<f4")):
        np.save(tmp_path / "a.npy", stored)
        assert np.array_equal(load_images(tmp_path / "a.npy").pixels, array.astype(np.float32))


def _npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + content


HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER % ("|u1", "(1000000, 100000, 10000)"), "1,000,000,000,000,000 bytes and has"),
        (HEADER % ("|u1", "(999999999999999999, 999999999999999999, 3)"), "bytes and has"),
        (HEADER % ("<f8", "(2, 2, 3)"), "asks for 96 bytes"),
        (HEADER % ("|O", "(2, 2, 3)"), "pickled objects"),
        (HEADER % ("<f999", "(2, 2, 3)"), "not a readable array"),
        (HEADER % ("|u1", "(-2, 2, 3)"), "not that of a plain array"),
        (HEADER % ("|u1", "(2.5, 2, 3)"), "not that of a plain array"),
        (HEADER % ("|u1", "('a', 2, 3)"), "not that of a plain array"),
        (HEADER % ("|u1", "(" * 9000), "not that of a plain array"),
        (HEADER % ("|u1", "(2, " * 9000), "not that of a plain array"),
        (HEADER % ("|u1", "(" + "9" * 9000 + ",)"), "not that of a plain array"),
        (HEADER % ("|u1'" + "-" * 9000, "(2, 2, 3)"), "not that of a plain array"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 2, 3), }", "plain array"),
        ("__import__('os').abort()", "not that of a plain array"),
        (HEADER % ("|u1", "(" + "9," * 20_000 + "x)"), "not that of a plain array"),
        (HEADER % ("|u1", "(2, 2, 3)") + "+ 1", "not that of a plain array"),
        ("", "not that of a plain array"),
    ],
)
def test_headers_are_not_believed(tmp_path: Path, header: str, message: str) -> None:
    for version in (1, 2):
        (tmp_path / "a.npy").write_bytes(_npy(header, bytes(12), version))
        with pytest.raises(DataError, match=rf"a\.npy.*{message}"):
            probe(tmp_path / "a.npy")
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", _npy(header, bytes(12), version))
        with pytest.raises(DataError, match=r"a\.npz"):
            load_images(tmp_path / "a.npz")


def test_an_archive_is_bounded_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((70_000, 32, 32), np.uint8))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"71,680,000 bytes, which a file of .* does not"):
        probe(path)
    np.savez_compressed(path, images=np.zeros((60_000, 32, 32), np.uint8))
    assert len(load_images(path)) == 60_000


def test_a_member_that_goes_on_is_refused(tmp_path: Path) -> None:
    header = HEADER % ("|u1", "(2, 2, 3)")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for held, words in ((1 << 20, "more than"), (11, "ends after 11 of 12 bytes")):
            with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
                archive.writestr("images.npy", _npy(header, bytes(held)))
                archive.writestr("other.npy", _npy(header, bytes(12)))
            with pytest.raises(DataError, match=rf"a\.npz .* it .*{words}"):
                load_images(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(_npy(header, bytes(12) + b"another array"))
    assert len(load_images(tmp_path / "a.npy")) == 2  # as numpy.load reads it


def test_an_archive_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.txt", b"")
    with pytest.raises(DataError, match=r"a\.zip holds no images; passed over: \.txt files \(1\)"):
        load_images(tmp_path / "a.zip")
