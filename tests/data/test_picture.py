"""One image file of any format: its pixels as bytes, and a sentence for what cannot be bytes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, load_images
from advkd.data.picture import suffixes


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def test_crop_takes_the_center(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    save(tmp_path / "wide.png", wide)
    assert (load_images(tmp_path, size=4).pixels == 200).all()
    squeezed = load_images(tmp_path, size=4, crop=False).pixels[0, 0]
    assert squeezed[0, 0] < 60 and squeezed[0, 3] < 60 < squeezed[0, 1]


def test_shrinking_averages(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "checks.png", checks)
    pixels = load_images(tmp_path, size=8).pixels
    assert np.abs(pixels.astype(int) - 127).max() <= 2  # picking single pixels gives 0 or 255


def test_folder_converts_channels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((8, 8), 50, np.uint8))
    save(tmp_path / "b.png", np.full((8, 8, 3), (200, 100, 0), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is grayscale but .*b\.png is RGB"):
        load_images(tmp_path)
    rgb = load_images(tmp_path, channels=3).pixels
    assert rgb[0, :, 0, 0].tolist() == [50, 50, 50]
    assert rgb[1, :, 0, 0].tolist() == [200, 100, 0]
    gray = load_images(tmp_path, channels=1).pixels
    assert gray[:, 0, 0, 0].tolist() == [50, round(0.299 * 200 + 0.587 * 100)]


def test_rare_modes(tmp_path: Path) -> None:
    save(tmp_path / "deep.png", np.full((8, 8), 65535, np.uint16))
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (10, 20, 30, 255)
    save(tmp_path / "clear.png", clear)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).quantize(4).save(tmp_path / "palette.png")
    pixels = load_images(tmp_path, channels=3).pixels  # clear, deep, palette
    assert pixels[0, :, 0, 0].tolist() == [10, 20, 30]
    assert pixels[0, :, 7, 7].tolist() == [255, 255, 255]
    assert (pixels[1] == 255).all()
    assert (pixels[2] == 90).all()


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".webp", ".jp2", ".TGA", ".ppm"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    if suffix.lower() not in suffixes():
        pytest.skip(f"this Pillow does not read {suffix}")
    save(tmp_path / "a.png", np.full((16, 16, 3), 120, np.uint8))
    save(tmp_path / f"b{suffix}", np.full((16, 16, 3), 120, np.uint8))
    images = load_images(tmp_path)
    assert len(images) == 2
    assert np.abs(images.pixels.astype(int) - 120).max() <= 2
    assert images.notes == ()


def test_suffixes_are_those_of_images() -> None:
    assert {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".mpo"} <= set(suffixes())
    assert not {".eps", ".ps", ".pdf", ".h5", ".mpg", ".npy", ".txt"} & set(suffixes())


def test_an_interpreter_is_not_started(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match=r"a\.png is not a readable image"):
        load_images(tmp_path)


# PNG's transparent color, at every depth that Pillow's writer does not have too.


def _png(path: Path, depth: int, kind: int, rows: list[bytes], transparent: bytes) -> None:
    """Write a PNG that is 4 pixels wide; kind: 0 grayscale, 2 RGB, 4 grayscale with alpha."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 4, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
    parts += [chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, bytes([0b01000000]), 0, [255, 255, 255, 255]),
        (2, bytes([0b00_01_10_11]), 1, [0, 255, 170, 255]),
        (4, bytes([0x12, 0x34]), 3, [17, 34, 255, 68]),
        (8, bytes([7, 8, 9, 10]), 8, [7, 255, 9, 10]),
        (16, struct.pack(">4H", 0, 2570, 25700, 257), 2570, [0, 255, 100, 1]),
    ],
)
def test_transparent_gray_is_white(
    tmp_path: Path, depth: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    _png(tmp_path / "a.png", depth, 0, [row] * 4, struct.pack(">H", transparent))
    assert load_images(tmp_path, channels=1).pixels[0, 0, 0].tolist() == expected


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_rgb_is_white(tmp_path: Path, depth: int) -> None:
    scale, code = (1, "B") if depth == 8 else (257, "H")
    values = np.array([(0, 0, 0), (1, 2, 3), (200, 100, 50), (3, 2, 1)])
    row = struct.pack(f">12{code}", *(values * scale).ravel())
    _png(tmp_path / "a.png", depth, 2, [row] * 4, struct.pack(">3H", *(values[2] * scale)))
    pixels = load_images(tmp_path).pixels[0, :, 0].T
    assert pixels.tolist() == [[0, 0, 0], [1, 2, 3], [255, 255, 255], [3, 2, 1]]


def test_deep_grayscale_with_alpha_is_grayscale(tmp_path: Path) -> None:
    row = struct.pack(">8H", 0, 65535, 25700, 65535, 0, 0, 65535, 65535)
    _png(tmp_path / "a.png", 16, 4, [row] * 4, b"")
    pixels = load_images(tmp_path).pixels
    assert pixels.shape == (1, 1, 4, 4)
    assert pixels[0, 0, 0].tolist() == [0, 100, 255, 255]


@pytest.mark.parametrize(("mode", "value"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_transparent_colors_of_pillow_are_white(
    tmp_path: Path, mode: str, value: int | tuple[int, ...]
) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "a.png", transparency=value)
    assert (load_images(tmp_path, channels=3).pixels == 255).all()


def test_transparency_fades_to_white(tmp_path: Path) -> None:
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(tmp_path / "a.png", np.dstack([np.zeros((16, 16, 3), np.uint8), alpha]))
    assert np.array_equal(load_images(tmp_path).pixels[0, 0], 255 - alpha)


# Numbers of more than 8 bits.

RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        (np.float32(RAMP / 255), RAMP, "floats: 0 is black and 1 is white"),
        (np.float32(RAMP), RAMP, "floats: 0 is black and 255 is white"),
        (np.float32(RAMP / 127.5 - 1), RAMP, "floats: -1 is black and 1 is white"),
        (np.int32(RAMP), RAMP, "8 bits: 0 is black and 255 is white"),
        (np.int32(RAMP * 257), RAMP, "8 bits: 0 is black and 65535 is white"),
        (np.uint16(RAMP), RAMP, "8 bits: 0 is black and 255 is white"),
        (np.uint16(RAMP * 257), RAMP, "8 bits: 0 is black and 65535 is white"),
    ],
)
def test_numbers_are_scaled(
    tmp_path: Path, values: np.ndarray, expected: np.ndarray, words: str
) -> None:
    save(tmp_path / "a.tiff", values)
    images = load_images(tmp_path)
    assert images.pixels.shape == (1, 1, 16, 16)
    assert np.array_equal(images.pixels[0, 0], expected)
    assert words in images.notes[0]


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
def test_one_scale_holds_for_all_files(tmp_path: Path, kind: type) -> None:
    """A dark image of a bright set stays dark."""
    white = 255 if kind is np.float32 else 65535
    save(tmp_path / "dark.tiff", np.full((8, 8), white / 255, kind))
    save(tmp_path / "white.tiff", np.full((8, 8), white, kind))
    assert load_images(tmp_path).pixels[:, 0, 0, 0].tolist() == [1, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((8, 8), -1, np.int32), "from -1 to -1, where 0 to 255 are expected"),
        (np.full((8, 8), 65536, np.int32), "from 65536 to 65536, where 0 to 65535"),
        (np.full((8, 8), 1e4, np.float32), "from 10000 to 10000, where 0 to 255 are expected"),
        (np.full((8, 8), -2, np.float32), "from -2 to -2, where -1 to 1 are expected"),
        (np.full((8, 8), np.nan, np.float32), "NaN or infinity"),
        (np.where(np.eye(8) > 0, np.inf, 0.5).astype(np.float32), "NaN or infinity"),
        (np.where(np.eye(8) > 0, np.nan, 0.5).astype(np.float32), "NaN or infinity"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, values: np.ndarray, words: str) -> None:
    save(tmp_path / "a.tiff", values)
    with pytest.raises(DataError, match=rf"a\.tiff.*{words}"):
        load_images(tmp_path)


def test_large_numbers_are_converted_in_strips(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4099, 1027)).astype(np.uint16)
    save(tmp_path / "a.tiff", values)
    pixels = load_images(tmp_path, size=1027, crop=True).pixels[0, 0]
    top = (4099 - 1027) // 2
    assert np.array_equal(pixels, np.rint(values[top : top + 1027] / 257))


# Color spaces, orientation, frames.


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "RGBA", "P", "1", "L", "LA"])
def test_color_spaces_become_rgb(tmp_path: Path, mode: str) -> None:
    color = (200, 40, 90) if mode in ("CMYK", "YCbCr", "RGBA", "P") else (255, 255, 255)
    image = Image.new("RGB", (8, 8), color)
    converted = image.quantize(4) if mode == "P" else image.convert(mode)
    converted.save(tmp_path / "a.tiff")
    pixels = load_images(tmp_path, channels=3).pixels[0, :, 0, 0].astype(int)
    assert np.abs(pixels - color).max() <= 2


def test_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((8, 8), np.uint8)
    upright[0, :3] = 200
    image = Image.fromarray(np.rot90(upright))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    for name in ("a.png", "b.tiff"):
        image.save(tmp_path / name, exif=exif)
    for pixels in load_images(tmp_path).pixels:
        assert np.array_equal(pixels[0], upright)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_images_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (30, 230, 130)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    images = load_images(tmp_path, channels=1)
    assert (images.pixels == 30).all()
    assert images.notes == ("1 file with several images: the first is read",)


# Files that are broken, or claim too much.


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "bmp", "webp"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = save(tmp_path / f"a.{suffix}", noise)
    content = path.read_bytes()
    for length in (len(content) * 2 // 3, 40, 9, 0):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"a\.{suffix} is not a readable image"):
            load_images(tmp_path)


@pytest.mark.parametrize("side", [5000, 12_000, 2**31 - 1])
def test_claims_of_many_pixels_are_refused(tmp_path: Path, side: int) -> None:
    path = save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(DataError, match=r"a\.png is not a readable image: .*pixels"):
        load_images(tmp_path)


def test_a_single_pixel_is_an_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((1, 1), 77, np.uint8))
    assert load_images(tmp_path).pixels.tolist() == [[[[77]]]]
    assert (load_images(tmp_path, size=8).pixels == 77).all()
