"""The cache of decoded images: the same bits as in memory, whatever happens while it is written."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from advkd.data import DataError, ImageSet, cache, load_images, pictures, source
from advkd.data.clusters import fit_clusters
from advkd.data.pixels import Mapped, identity
from advkd.data.split import hold_out
from tests.data.test_zipped import write_zip

COUNT = 700  # images: three shards of one block each
GIB = 1 << 20  # KiB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; no set is small enough for memory, and shards are of 256 images."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(source, "IN_MEMORY", 0)
    monkeypatch.setattr(cache, "SHARD", 1)
    monkeypatch.setattr(cache, "_POLL", 0.01)
    return tmp_path / "cache"


def noise(count: int = COUNT, channels: int = 3, size: int = 9) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, channels, size, size), np.uint8)


def floats(path: Path) -> Path:
    """An array that is decoded: floats in [0, 1], the lowest and highest in the last shard."""
    values = noise() / np.float32(512) + np.float32(0.25)
    values[-1] = np.linspace(0, 1, values[-1].size).reshape(values[-1].shape)
    np.save(path, values)
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("images-*/shard-*.npy"))


def in_memory(path: Path, **settings: Any) -> ImageSet:
    """The same images as they are read where they are few."""
    with pytest.MonkeyPatch.context() as few:
        few.setattr(source, "IN_MEMORY", 1 << 28)
        return load_images(path, **settings)


def write_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Write a source of every kind, by name with what it is read by; the last ones are mapped."""
    folder.mkdir()
    pixels = noise()
    np.savez_compressed(folder / "packed.npz", images=pixels, labels=np.arange(COUNT) % 3)
    np.savez_compressed(folder / "half.npz", x=(pixels / 255).astype(np.float16))
    idx = struct.pack(">4I", 0x0803, *pixels[:, 0].shape) + pixels[:, 0].tobytes()
    (folder / "idx.gz").write_bytes(gzip.compress(idx))
    write_zip(folder / "images.zip", pixels[:300])
    for number, image in enumerate(pixels[:300]):
        (folder / "png").mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "png" / f"{number:03}.png")
    floats(folder / "floats.npy")
    np.save(folder / "chw.npy", pixels)
    np.save(folder / "hwc.npy", pixels.transpose(0, 2, 3, 1))
    np.savez(folder / "stored.npz", a=np.zeros(3), images=pixels)
    (folder / "idx").write_bytes(idx)
    decoded = ("packed.npz", "half.npz", "idx.gz", "images.zip", "png", "floats.npy")
    found: dict[str, dict[str, Any]] = {name: {} for name in decoded}
    found["chw.npy"] = {"size": 6, "channels": 1}
    return found | {name: {} for name in ("hwc.npy", "stored.npz", "idx")}


def test_every_kind_has_the_bits_of_memory(tmp_path: Path, folder: Path) -> None:
    for name, settings in write_all(tmp_path / "sets").items():
        path, before = tmp_path / "sets" / name, len(list(folder.glob("images-*")))
        found, expected = load_images(path, **settings), in_memory(path, **settings)
        is_mapped = name in ("hwc.npy", "stored.npz", "idx")
        assert len(list(folder.glob("images-*"))) - before == (not is_mapped), name
        assert isinstance(found.pixels, Mapped) and isinstance(expected.pixels, np.ndarray)
        assert found.pixels.shape == expected.pixels.shape
        assert found.pixels.dtype == expected.pixels.dtype
        assert np.array_equal(found.pixels[:], expected.pixels), name
        assert np.array_equal(load_images(path, **settings).pixels[:], expected.pixels), name
        assert (found.notes, found.classes) == (expected.notes, expected.classes)


def test_batches_and_parts_are_those_of_memory(tmp_path: Path) -> None:
    path = floats(tmp_path / "a.npy")
    ours, theirs = hold_out(load_images(path)), hold_out(in_memory(path))
    rows, flip = np.array([5, 0, 300, 5]), np.array([True, False, True, False])
    for found, expected in ((ours.train, theirs.train), (ours.held_out, theirs.held_out)):
        assert isinstance(found.pixels, Mapped)
        rows = rows % len(found)
        assert found.batch(rows, flip).equal(expected.batch(rows, flip))
        assert identity(found.pixels) == identity(expected.pixels)
        assert np.array_equal(
            fit_clusters(found, 8).labels(found), fit_clusters(expected, 8).labels(expected)
        )
    part = ours.train.subset([3, 1, 3]).subset(np.array([2, 0]))
    assert np.array_equal(part.pixels[:], theirs.train.subset([3, 3]).pixels)


def test_the_identity_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = floats(tmp_path / "a.npy")
    expected = [identity(part.pixels) for part in vars(hold_out(load_images(path))).values()]
    again = hold_out(load_images(path))
    monkeypatch.setattr(Mapped, "__getitem__", lambda self, rows: pytest.fail("it was read"))
    assert [identity(part.pixels) for part in vars(again).values()] == expected
    assert expected[0] != expected[1]


def test_the_identity_is_of_these_very_shards(tmp_path: Path, folder: Path) -> None:
    path = floats(tmp_path / "a.npy")
    before = identity(load_images(path).pixels)
    first = shards(folder)[0]
    pixels = np.load(first)
    pixels[3] = 0  # as another version of a decoder would have it
    np.save(first, pixels)
    checksum = hashlib.sha256(first.read_bytes()).hexdigest()
    first.with_suffix(".json").write_text(json.dumps({"sha256": checksum}))
    after = load_images(path).pixels
    assert identity(after) == identity(after[:]) != before


def test_what_is_mapped_is_held_to_its_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=noise())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is not a readable array: images\.npy is cut or"):
        load_images(tmp_path / "a.npz")
    np.save(tmp_path / "f.npy", np.asfortranarray(noise()))
    with pytest.raises(DataError, match=r"f\.npy .* Fortran order"):
        load_images(tmp_path / "f.npy")


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "drop", "seal"])
def test_a_damaged_shard_is_decoded_again(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    path = floats(tmp_path / "a.npy")
    expected = load_images(path).pixels[:]
    victim = shards(folder)[1]
    whole, times = victim.read_bytes(), [file.stat().st_mtime_ns for file in shards(folder)]
    if harm == "flip":  # as a disk does it, which leaves size and time
        victim.write_bytes(whole[:900] + bytes([whole[900] ^ 4]) + whole[901:])
        os.utime(victim, ns=(times[1], times[1]))
    elif harm == "cut":
        victim.write_bytes(whole[:-1])
    elif harm == "grow":
        victim.write_bytes(whole + b"\0")
    elif harm == "drop":
        victim.unlink()
    else:
        victim.with_suffix(".json").write_text('{"sha256": 3}')
    capsys.readouterr()
    assert np.array_equal(load_images(path).pixels[:], expected)
    assert f"{victim} is damaged and is decoded again" in capsys.readouterr().err
    assert victim.read_bytes() == whole
    untouched = [file.stat().st_mtime_ns for file in shards(folder)]
    assert [untouched[0], untouched[2]] == [times[0], times[2]]


def test_other_images_at_a_path_are_another_cache(tmp_path: Path, folder: Path) -> None:
    path = floats(tmp_path / "a.npy")
    assert len(load_images(path)) == COUNT
    np.save(path, noise() / np.float32(255))
    os.utime(path, ns=(1, 1))
    assert np.array_equal(load_images(path).pixels[:], in_memory(path).pixels)
    load_images(path, size=4)
    assert len(list(folder.glob("images-*"))) == 3


def test_images_that_change_in_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "png"
    place.mkdir()
    for number, image in enumerate(noise(3)):
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number}.bmp")
    before = load_images(place).pixels[:]
    Image.fromarray(noise(4)[3].transpose(1, 2, 0)).save(place / "1.bmp")
    os.utime(place / "1.bmp", ns=(1, 1))
    after = load_images(place).pixels[:]
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_a_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = floats(tmp_path / "a.npy")
    needed = COUNT * 3 * 9 * 9 * 4
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    message = rf"a\.npy: .* another {needed:,} bytes in .*cache, where {needed - 1:,} are free: set"
    with pytest.raises(DataError, match=message):
        load_images(path)
    assert not shards(folder)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=needed))
    assert len(load_images(path)) == COUNT
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/images-\w+ cannot be used: Not a dir"):
        load_images(path)


def test_a_disk_that_fills_up_leaves_whole_shards(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = floats(tmp_path / "a.npy"), cache._Cache.write

    def full(self: Any, number: int, *rest: Any) -> None:
        if number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, *rest)

    with monkeypatch.context() as context:
        context.setattr(cache._Cache, "write", full)
        with pytest.raises(DataError, match=f"another {(COUNT - 256) * 972:,} bytes in .* ADVKD_C"):
            load_images(path)
    assert [file.name for file in shards(folder)] == ["shard-00000.npy"]
    assert not list(folder.rglob("*.claim")) and not list(folder.rglob(".*"))
    assert np.array_equal(load_images(path).pixels[:], in_memory(path).pixels)


def test_a_broken_image_is_named_and_what_was_decoded_stays(tmp_path: Path, folder: Path) -> None:
    write_zip(tmp_path / "a.zip", noise(600), {400: noise(401)[400].tobytes()})
    with pytest.raises(DataError, match=r"a\.zip/00000/img00000400\.png is not a readable image"):
        load_images(tmp_path / "a.zip")
    place = tmp_path / "png"
    for number, image in enumerate(noise(600)):
        place.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number:03}.png")
    whole = (place / "400.png").read_bytes()
    (place / "400.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    with pytest.raises(DataError, match=r"400\.png is not a readable image"):
        load_images(place)
    assert [file.name for file in shards(folder)] == ["shard-00000.npy"]
    assert not list(folder.rglob("*.claim"))


SLOW = """
import sys, time
from advkd.data import cache, load_images, source
from advkd.data.pixels import identity
source.IN_MEMORY, cache.SHARD = 0, 1
write, pause, log = cache._Cache.write, float(sys.argv[2]), open(sys.argv[3], "a")
def slowly(self, number, read, tick):
    def tock(images):
        time.sleep(pause)
        tick(images)
    print(number, file=log, flush=True)
    write(self, number, read, tock)
cache._Cache.write = slowly
print(identity(load_images(sys.argv[1]).pixels))
"""


def start(path: Path, pause: float, log: Path) -> subprocess.Popen[str]:
    """Decode in another process that takes `pause` seconds for a shard, and logs each."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path), str(pause), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_is_gone_on_from(tmp_path: Path, folder: Path) -> None:
    path, log = floats(tmp_path / "a.npy"), tmp_path / "log"
    killed = start(path, 30, log)
    wait_for(lambda: list(folder.rglob(".shard-00000.*.tmp")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(folder.rglob("*.claim")) and not shards(folder)
    with pytest.MonkeyPatch.context() as context:  # no waiting for a process that is gone
        context.setattr(cache, "PATIENCE", 1e9)
        found = load_images(path).pixels
    assert identity(found) == identity(in_memory(path).pixels)
    assert not list(folder.rglob("*.claim")) and not list(folder.rglob(".*.tmp"))


def test_processes_share_the_work(tmp_path: Path, folder: Path) -> None:
    path, log = floats(tmp_path / "a.npy"), tmp_path / "log"
    running = [start(path, 0.5, log) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    expected = identity(in_memory(path).pixels)
    assert [out.strip() for out, _ in outputs] == [expected, expected]
    assert sorted(log.read_text().split()) == ["0", "1", "2"]  # each by one of them only
    assert not list(folder.rglob("*.claim"))


def claim_elsewhere(folder: Path, path: Path) -> Path:
    """What another machine leaves that begins with the first shard of this set."""
    load_images(path)
    (place,) = folder.glob("images-*")
    for file in place.iterdir():
        file.unlink()
    claim = place / "shard-00000.claim"
    claim.write_text(f"{os.getpid()} {socket.gethostname()}x")
    (place / ".shard-00000.npy.0a.9.tmp").touch()
    return claim


def test_a_silent_process_elsewhere_is_taken_over(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = floats(tmp_path / "a.npy")
    claim = claim_elsewhere(folder, path)
    os.utime(claim, ns=(1, 1))  # however wrong the clock there is, only a standstill counts
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    began = time.monotonic()
    assert np.array_equal(load_images(path).pixels[:], in_memory(path).pixels)
    assert time.monotonic() - began > 0.3
    assert not list(folder.rglob("*.claim")) and not list(folder.rglob(".*.tmp"))


def test_a_process_that_was_taken_over_does_no_harm(tmp_path: Path, folder: Path) -> None:
    path, log = floats(tmp_path / "a.npy"), tmp_path / "log"
    slow = start(path, 1.0, log)
    wait_for(lambda: list(folder.rglob(".shard-00000.*.tmp")))
    (claim,) = folder.rglob("*.claim")
    claim.write_text(f"1 {socket.gethostname()}x")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(cache, "PATIENCE", 0.0)
        found = identity(load_images(path).pixels)
    out, err = slow.communicate(timeout=120)
    assert slow.returncode == 0, err
    assert out.strip() == found == identity(in_memory(path).pixels)


def test_headers_of_many_images_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(pictures, "MANY", 300)
    write_zip(tmp_path / "a.zip", noise(300))
    expected = load_images(tmp_path / "a.zip")
    with monkeypatch.context() as context:
        context.setattr(pictures, "read_head", lambda file: pytest.fail("a header was read"))
        again = load_images(tmp_path / "a.zip")
        small = load_images(tmp_path / "a.zip", size=6, channels=1)
    assert np.array_equal(again.pixels[:], expected.pixels[:])
    assert again.notes == expected.notes and len(small.notes) == 1
    (survey,) = (folder / "surveys").iterdir()
    whole = survey.read_text()
    none = json.dumps({"heads": [], "intervals": {}})
    other = json.dumps({"heads": [[9, 9, 3, "", False, 300, 300]], "intervals": {}})
    for content in ("{}", none, other, '{"heads": 3}', "nonsense"):
        survey.write_text(content)
        assert load_images(tmp_path / "a.zip").notes == expected.notes
    assert survey.read_text() == whole  # as it was written anew for what is no JSON


MEASURED = """
import os, sys, threading, time
import numpy as np
from advkd.data.split import real_images
from advkd.evaluation.protocol import images_hash

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        with open("/proc/self/status") as status:
            peak = max(peak, *(int(s.split()[1]) for s in status if s.startswith("RssAnon")))
thread = threading.Thread(target=watch)
thread.start()
images = real_images(sys.argv[1], 32, 3, True)
for part in (images.train, images.held_out):
    images_hash(part)
    part.batch(np.arange(200)[::-1], np.arange(200) % 2 == 0)
done.set()
thread.join()
print(len(images.train) + len(images.held_out), type(images.train.pixels).__name__, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["mapped", "decoded"])
def test_memory_of_200_000_images(tmp_path: Path, folder: Path, kind: str) -> None:
    few = noise(1000, 3, 32).transpose(0, 2, 3, 1)
    few = few if kind == "mapped" else few[..., 0]  # which is made RGB, and so decoded
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (200_000, *few.shape[1:]))
    for first in range(0, len(array), len(few)):
        array[first : first + len(few)] = few
    del array
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "a.npy")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    count, pixels, peak = ran.stdout.split()
    assert (int(count), pixels) == (200_000, "Mapped")
    assert bool(shards(folder)) == (kind == "decoded")
    assert int(peak) < GIB, f"{int(peak) / 1024:.0f} MiB"
