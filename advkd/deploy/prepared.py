"""Students as model files in the user's folder of caches, for `advkd sample` without torch.

Importing torch takes longer than anything that a student does. So whoever samples a student's
folder leaves its model file (`model_file.py`), under a hash of all that decides its content, and
from then on the images come from that file, to the bit those of the engine. A file that is not
there, damaged or of another version only costs the time that it would have saved.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from advkd.files import cache_folder, write_bytes

# numpy's import takes as long as all else of a start, so it waits until it is needed.
if TYPE_CHECKING:
    import numpy as np

    from advkd.runtime import Student

ENTRIES = 16  # of the cache; those that were used longest ago go
MOST_BYTES = 64 << 20  # of a student's weights
MOST_NUMBERS = 1 << 16  # of images that are sampled by the time that numpy is imported
# What makes a model file of a student's folder, in this package.
_MAKERS = (
    *("deploy/model_file.py", "engine/lowering.py", "engine/networks.py", "engine/plan.py"),
    *("models/layers.py", "models/student.py"),
)
# The Philox step word of labels for sampling: engine/noise.py, which needs torch.
_LABEL_STEP = 0xFFFFFFFE ^ 1 << 24


class Prepared:
    """A student that is open without torch."""

    def __init__(self, student: Student):
        self._student = student
        self.channels, self.heads = student.channels, student.heads
        self.num_classes = student.classes or None
        self.class_names = student.class_names

    def labels(self, num: int, seed: int, first: int) -> np.ndarray:
        """The labels (num,) int64 of images number `first` and later; num_classes is not None."""
        import numpy as np

        from advkd import _C

        assert self.num_classes is not None
        numbers = np.arange(first, first + num, dtype=np.int64)
        words = np.empty_like(numbers)
        _C.philox_uint32(
            seed, numbers.ctypes.data, _LABEL_STEP, num, 1, 0, words.ctypes.data, 1
        )  # fmt: skip
        return (words * self.num_classes) >> 32

    def images(self, args: argparse.Namespace, y: np.ndarray | None) -> np.ndarray:
        """The images that `advkd sample`'s options ask for, (N, C, H, W) float32 in [-1, 1].

        ValueError for a head that is not there.
        """
        import numpy as np

        images = self._student.generate(
            args.num, args.seed, first=args.first, labels=y, exit_at=args.exit_at,
            dtype="float32", threads=args.threads or None,
        )  # fmt: skip
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def shape(self, exit_at: int | None) -> tuple[int, int, int]:
        """(C, H, W) of its images; ValueError for a head that is not there."""
        if exit_at is not None and not 1 <= exit_at <= len(self.heads):
            raise ValueError(f"exit_at={exit_at} is not between 1 and {len(self.heads)}")
        side = self.heads[(exit_at or 0) - 1]
        return self.channels, side, side

    def pixels(self, args: argparse.Namespace, label: int | None) -> bytes | None:
        """The same images without numpy, as bytes in the order (number, row, column, channel).

        None for so many that numpy is imported in less time; ValueError for a head that is not
        there.
        """
        if args.num * math.prod(self.shape(args.exit_at)) > MOST_NUMBERS:
            return None
        return self._student.generate_bytes(
            args.num, args.seed, first=args.first, label=label, exit_at=args.exit_at
        )

    def prepare(self) -> None:
        """Do nothing: it is prepared."""


def grid_png(pixels: bytes, shape: tuple[int, int, int], columns: int, scale: int) -> bytes:
    """The PNG of `report.pictures` with a grid of `Prepared.pixels`, images of shape (C, H, W)."""
    from PIL import Image

    channels, height, width = shape
    mode, size = "L" if channels == 1 else "RGB", math.prod(shape)
    num = len(pixels) // size
    sheet = Image.new(mode, (columns * width, -(-num // columns) * height))
    for i in range(num):
        image = Image.frombytes(mode, (width, height), pixels[i * size : (i + 1) * size])
        sheet.paste(image, (i % columns * width, i // columns * height))
    large = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def key_of(source: str) -> str | None:
    """The name that a student, by its folder or zoo:NAME, has in the cache.

    None for what cannot be a student, and for weights that are too large to be kept twice.
    """
    package = Path(__file__).resolve().parents[1]
    zoo, colon, name = source.partition(":")
    folder = package / "zoo" / name if (zoo, colon) == ("zoo", ":") else Path(source)
    weights = folder / "model.safetensors"
    digest = hashlib.sha256()
    try:
        if weights.stat().st_size > MOST_BYTES:
            return None
        for path in (weights, folder / "config.json", *(package / maker for maker in _MAKERS)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return None
    return digest.hexdigest()[:32]


def _entry(key: str) -> Path:
    return cache_folder() / "students" / f"{key}.advkd"


def find(key: str) -> Prepared | None:
    """The student of that key, if it has been kept and opens."""
    path = _entry(key)
    if not path.is_file() or importlib.util.find_spec("advkd._C") is None:
        return None
    try:
        from advkd import runtime

        student = runtime.load(path)
        os.utime(path)
    except (ImportError, OSError, MemoryError, ValueError):
        return None
    return Prepared(student)


def keep(key: str, content: bytes) -> None:
    """Keep a model file under its key. A disk that is full, or not there, is no error."""
    with contextlib.suppress(OSError):
        path = _entry(key)
        write_bytes(path, content)
        kept = sorted(path.parent.glob("*.advkd"), key=lambda entry: entry.stat().st_mtime)
        for entry in kept[:-ENTRIES]:
            entry.unlink(missing_ok=True)
