"""Mutated images, arrays and descriptions: pixels, or a DataError that is short, and soon.

`hostile_seeds` writes one whole file of every kind that the readers of images take, for other tests
that mutate files too.
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, dataset, load_images

Reader = Callable[[Path], object]  # takes the mutated file

MUTATIONS = 60  # of each file
SECONDS = 5.0
SUFFIXES = ("png", "jpg", "gif", "bmp", "webp", "avif", "jp2", "tga", "ppm", "qoi", "ico", "sgi")


def read_beside(path: Path) -> object:
    """Read the folder that an image file lies in."""
    return load_images(path.parent, channels=3)


def read_split(path: Path) -> object:
    """Read the training split of the data set that a dataset.toml describes."""
    return dataset(path.parent).train()


def hostile_seeds(folder: Path) -> list[tuple[Path, Reader]]:
    """Write a small file of every kind into a folder of its own; returns each with its reader."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    seeds: list[tuple[Path, Reader]] = []

    def place(name: str, reader: Reader) -> Path:
        path = folder / f"{len(seeds):02}" / name
        path.parent.mkdir(parents=True)
        seeds.append((path, reader))
        return path

    for suffix in SUFFIXES:
        if f".{suffix}" in Image.registered_extensions():
            Image.fromarray(noise).save(place(f"a.{suffix}", read_beside))
    Image.fromarray(noise).save(place("clear.png", read_beside), transparency=(1, 2, 3))
    Image.fromarray(noise).quantize(9).save(place("p.png", read_beside), transparency=2)
    gray = noise[..., 0]
    for number, kind in enumerate((np.uint8, np.uint16, np.int32, np.float32)):
        Image.fromarray(gray.astype(kind)).save(place(f"{number}.tiff", read_beside))
    frames = [Image.fromarray(np.roll(gray, shift)) for shift in range(3)]
    frames[0].save(place("frames.gif", read_beside), save_all=True, append_images=frames[1:])
    frames[0].save(place("frames.tiff", read_beside), save_all=True, append_images=frames[1:])
    images, labels = noise.transpose(2, 0, 1), np.arange(3)
    np.save(place("a.npy", load_images), images / 255)
    np.savez(place("stored.npz", load_images), images=images, labels=labels)
    np.savez_compressed(place("packed.npz", load_images), images=images, labels=labels)
    idx = struct.pack(">IIII", 0x0803, *images.shape) + images.tobytes()
    place("images-idx3-ubyte", load_images).write_bytes(idx)
    place("images-idx3-ubyte.gz", load_images).write_bytes(gzip.compress(idx))
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        write_zip(place(name, load_images), noise[None].repeat(3, 0).transpose(0, 3, 1, 2), method)
    described = place("dataset.toml", read_split)
    described.write_text('size = 12\nclasses = ["a", "b", "c"]\n\n[splits]\ntrain = "train.npz"\n')
    np.savez(described.parent / "train.npz", images=images, labels=labels)
    return seeds


def write_zip(path: Path, pixels: np.ndarray, method: int) -> None:
    """A zip of images (N, C, H, W) with labels, as EDM's dataset_tool writes it."""
    names = [f"00000/img{number:08d}.png" for number in range(len(pixels))]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, image in zip(names, pixels, strict=True):
            with archive.open(name, "w") as file:
                Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
        archive.writestr("dataset.json", json.dumps({"labels": [[name, 0] for name in names]}))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Content with bytes changed, mostly near its start, or a part cut, repeated or replaced."""
    data, n = bytearray(content), len(content)
    action = rng.randrange(5)
    if action <= 1:
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(min(n, 64)) if rng.random() < 0.6 else rng.randrange(n)
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif action == 2:
        del data[rng.randrange(n) :]
    elif action == 3:
        at, width = rng.randrange(n), rng.choice((2, 4, 8))
        data[at : at + width] = rng.choice((b"\xff", b"\0", b"9", b"[", b"\x7f")) * width
    else:
        first = rng.randrange(n)
        data[rng.randrange(n) : 0] = data[first : first + rng.randrange(1, 400)]
    return bytes(data)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Reader]]:
    return hostile_seeds(tmp_path_factory.mktemp("hostile"))


def test_whole_files_are_read(seeds: list[tuple[Path, Reader]]) -> None:
    assert len(seeds) >= 20
    for path, reader in seeds:
        assert len(reader(path)) in (1, 3)  # type: ignore[arg-type]


def test_mutated_files_end_in_a_sentence(seeds: list[tuple[Path, Reader]]) -> None:
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, reader in seeds:
        whole = path.read_bytes()
        for number in range(MUTATIONS):
            path.write_bytes(mutated(whole, random.Random(f"{path.name} {number}")))
            began = time.monotonic()
            try:
                reader(path)
            except DataError as error:
                refused += 1
                message = str(error)
                assert path.parent.name in message and len(message) < 1500, message
            assert time.monotonic() - began < SECONDS, f"{path.name} {number}"
        path.write_bytes(whole)
    assert refused > MUTATIONS * len(seeds) // 4
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 1 << 20  # KiB
