"""Decoded images on disk, for sets that are too large to be held in memory.

A set is a folder of memory-mapped shards `shard-NNNNN.npy`, (n, C, S, S), each closed by a JSON
with its checksum. Its name is a hash of all that decides its content, the time of every file that
is read included, so images that changed are decoded into another folder.

Any number of processes, on one machine or several that share the folder, may fill it at once. A
shard is written under a name of its own and renamed when it is whole, so whatever they do, a shard
is whole or absent; that each is decoded by one of them only is settled by files that are created
atomically (`_Claims`), and no lock is needed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.console import progress_bar
from advkd.data.geometry import BLOCK
from advkd.data.pixels import Mapped
from advkd.data.sentences import DataError, plural
from advkd.files import (
    CACHE_VARIABLE,
    CheckpointError,
    cache_folder,
    created,
    is_running,
    read_json,
    replacing,
    write_json,
)

FORMAT = 1  # of the folders, and of how images are decoded
SHARD = 64 << 20  # bytes of a shard, where there are no more than
MAX_SHARDS = 256  # of them, since each takes a file descriptor
PATIENCE = 60.0  # seconds without a sign of life after which another process's shard is taken over
_POLL = 0.2  # seconds between looks at what other processes write

Read = Callable[[int, int], np.ndarray]  # images start .. stop; start is a multiple of BLOCK


def key_of(*parts: Any) -> str:
    """A name for what these JSON values decide."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def remembered(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once and then read from the cache; it has to be JSON."""
    file = cache_folder() / "surveys" / f"{key}.json"
    with contextlib.suppress(CheckpointError):
        return read_json(file)
    found = make()
    with contextlib.suppress(OSError):  # it only saves time
        write_json(file, found)
    return found


@dataclass(frozen=True)
class Layout:
    """What a set is decoded to: images (N, C, S, S) of a dtype, under a name for people."""

    title: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def per_shard(self) -> int:
        """Images of a shard: whole blocks."""
        images = max(SHARD // self.image_bytes, -(-self.shape[0] // MAX_SHARDS))
        return -(-images // BLOCK) * BLOCK


def decoded(key: str, layout: Layout, reader: Callable[[], AbstractContextManager[Read]]) -> Mapped:
    """The images that `reader` reads, memory-mapped; what the cache lacks of them is decoded first.

    Checksums of all shards are compared. DataError where the disk is too small, or images are
    broken; what was decoded until then stays.
    """
    cache = _Cache(cache_folder() / f"images-{key}", layout)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        while missing := cache.missing():
            _fill(cache, missing, reader)
        return cache.mapped()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cache.too_small(cache.open_shards()) from error
        place = error.filename or cache.folder
        raise DataError(f"{place} cannot be used: {error.strerror or error}") from error


class _Cache:
    """The shards of one set in a folder."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.shards = range(-(-layout.shape[0] // layout.per_shard))
        self._whole: dict[int, str] = {}  # SHA-256 of the shards that were compared with it

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npy"

    def rows(self, number: int) -> range:
        each, count = self.layout.per_shard, self.layout.shape[0]
        return range(number * each, min((number + 1) * each, count))

    def is_closed(self, number: int) -> bool:
        return self.path(number).with_suffix(".json").is_file()

    def open_shards(self) -> list[int]:
        """Shards that are not decoded yet."""
        return [number for number in self.shards if not self.is_closed(number)]

    def images(self, numbers: list[int]) -> int:
        """How many images these shards hold."""
        return sum(len(self.rows(number)) for number in numbers)

    def missing(self) -> list[int]:
        """Shards that are not there, or are not what was written; these are opened, by name."""
        missing = self.open_shards()
        unread = [n for n in self.shards if n not in self._whole and n not in missing]
        if not unread:
            return missing
        with (
            ThreadPoolExecutor(torch.get_num_threads()) as pool,
            progress_bar("check data", len(unread), unit="file") as bar,
        ):
            for number, checksum in zip(unread, pool.map(self._checksum, unread), strict=True):
                bar.update()
                if checksum is not None:
                    self._whole[number] = checksum
                    continue
                path = self.path(number)
                path.with_suffix(".json").unlink(missing_ok=True)
                missing.append(number)
                print(f"advkd: {path} is damaged and is decoded again", file=sys.stderr)
        return sorted(missing)

    def _checksum(self, number: int) -> str | None:
        """The shard's SHA-256; None where it is not the one that was written."""
        path = self.path(number)
        try:
            expected = read_json(path.with_suffix(".json")).get("sha256")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (CheckpointError, FileNotFoundError):
            return None
        return found if found == expected else None

    def _header(self, number: int) -> bytes:
        shape = (len(self.rows(number)), *self.layout.shape[1:])
        described = {"descr": self.layout.dtype.str, "fortran_order": False, "shape": shape}
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, described)
        return file.getvalue()

    def write(self, number: int, read: Read, tick: Callable[[int], None]) -> None:
        """Decode a shard, close it, and tell `tick` of every block of images."""
        digest, rows, path = hashlib.sha256(), self.rows(number), self.path(number)
        with replacing(path) as temporary, temporary.open("wb") as file:
            for start in range(rows.start, rows.stop, BLOCK):
                images = read(start, min(start + BLOCK, rows.stop))
                if start == rows.start:
                    digest.update(header := self._header(number))
                    file.write(header)
                digest.update(images.data)
                file.write(images.data)
                tick(len(images))
        write_json(path.with_suffix(".json"), {"sha256": digest.hexdigest()})

    def too_small(self, missing: list[int]) -> DataError:
        """What to say where the disk does not hold these shards."""
        needed = self.images(missing) * self.layout.image_bytes
        return DataError(
            f"{self.layout.title}: the decoded images take another {needed:,} bytes in "
            f"{self.folder.parent}, where {self.free():,} are free: set {CACHE_VARIABLE} to a "
            "folder on a larger disk"
        )

    def free(self) -> int:
        """Bytes that the disk has to give."""
        return shutil.disk_usage(self.folder).free

    def mapped(self) -> Mapped:
        """All shards as one array."""
        paths = [self.path(number) for number in self.shards]
        shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        content = key_of(*(self._whole[number] for number in self.shards))
        return Mapped(shards, notes=self.folder / f"identity-{content[:16]}")


def _fill(
    cache: _Cache, missing: list[int], reader: Callable[[], AbstractContextManager[Read]]
) -> None:
    """Decode the missing shards, but those that other processes decode meanwhile: wait for them."""
    count, total = cache.images(missing), cache.layout.shape[0]
    needed = count * cache.layout.image_bytes
    if needed > cache.free():
        raise cache.too_small(missing)
    words = f"{plural(count, 'image')} to decode once, {needed / 1e6:,.0f} MB in {cache.folder}"
    print(f"advkd: {cache.layout.title}: {words}", file=sys.stderr)
    claims = _Claims(cache.folder)
    with (
        contextlib.ExitStack() as stack,
        progress_bar("decode", total, total - count, unit="image") as bar,
    ):
        opened = functools.cache(lambda: stack.enter_context(reader()))
        while missing:
            left = [n for n in missing if not _decode(cache, claims, n, opened, bar.update)]
            if left == missing:
                time.sleep(_POLL)
            missing = left


def _decode(
    cache: _Cache,
    claims: _Claims,
    number: int,
    opened: Callable[[], Read],
    update: Callable[[int], object],
) -> bool:
    """Decode a shard, unless another process is at it; returns whether it is there now."""
    if not claims.take(number):
        return False
    with claims.held(number):
        if cache.is_closed(number):  # by another process, in the meantime
            update(len(cache.rows(number)))
            return True
        read = opened()

        def tick(images: int) -> None:
            update(images)
            claims.renew(number)

        try:
            cache.write(number, read, tick)
        except FileNotFoundError:  # another process took the shard over, and what was written
            return False
    return True


class _Claims:
    """Which process decodes which shard: whoever creates `shard-NNNNN.claim`.

    A claim is renewed with every block of images. One that is not for PATIENCE seconds, or whose
    process is gone where that can be seen, is taken over. Two processes that decode the same shard
    after all do no harm but to their time.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._seen: dict[int, tuple[int, float]] = {}  # time of the file, and when it was new here

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.claim"

    def take(self, number: int) -> bool:
        """Whether the shard is now this process's to decode."""
        path, owner = self._path(number), f"{os.getpid()} {socket.gethostname()}"
        if created(path, owner):
            return True
        if not self._is_abandoned(number):
            return False
        path.unlink(missing_ok=True)
        for left_behind in self._folder.glob(f".shard-{number:05d}.*.tmp"):
            left_behind.unlink(missing_ok=True)
        return created(path, owner)

    def _is_abandoned(self, number: int) -> bool:
        path, now = self._path(number), time.monotonic()
        try:
            renewed, owner = path.stat().st_mtime_ns, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        pid, _, host = owner.partition(" ")
        # One of our own number is of an earlier process, since this one holds none.
        is_here = host == socket.gethostname() and pid.isdigit()
        if is_here and (int(pid) == os.getpid() or not is_running(int(pid))):
            return True
        # Ages are told by this machine's clock alone, since that of the disk may be another's.
        seen, since = self._seen.get(number, (0, now))
        if seen != renewed:
            since = now
        self._seen[number] = (renewed, since)
        return now - since > PATIENCE

    def renew(self, number: int) -> None:
        """Show that this process is at work."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(number))

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Give a shard back at the end, decoded or not."""
        try:
            yield
        finally:
            self._path(number).unlink(missing_ok=True)
