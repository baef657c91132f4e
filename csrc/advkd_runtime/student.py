"""A student that is open: what it makes, and its images, on several threads."""

from __future__ import annotations

import ctypes
import operator
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import library

# numpy takes longer to import than a student to open and to run, so it waits until it is needed.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    Source = str | os.PathLike[str] | bytes | bytearray | memoryview
    Label = int | str

# A request of up to FEW images runs the algorithms that are fastest for one image, and others those
# for many; the two round differently. So no part of a request may be on the other side of FEW.
FEW = 3
PART = 64  # images, at most, of one call of the library, which Ctrl-C does not interrupt
WORTHWHILE = 16  # images for which one more thread is started
MOST_THREADS = 8  # unless the caller asks for more
_END = 1 << 63  # numbers of images lie below


class Student:
    """A student of a model file: `load` opens it. Any number of threads may use it at once.

    size: pixels of a side of its images, which are square.
    channels: 1 for grey, 3 for red, green and blue.
    classes: labels lie in [0, classes); 0 for a student that takes none.
    class_names: one for each class, or None where they have none.
    heads: pixels of a side of the images of each head, from the first to the last.
    arena_bytes, weights_bytes: memory of one image's activations, and of the weights.
    isa: the instruction set in use, such as "avx2".
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Opens the bytes of a model file; ModelError, which begins with `name`, if it is none."""
        self._model = library.open_model(data, name)
        info = library.describe(self._model)
        self.size: int = info.size
        self.channels: int = info.channels
        self.classes: int = info.classes
        names = [library.class_name(self._model, label) for label in range(info.classes)]
        named = tuple(name for name in names if name is not None)
        self.class_names = named if named and len(named) == len(names) else None
        self.heads = tuple(library.image_size(self._model, k + 1) for k in range(info.heads))
        self.arena_bytes: int = info.arena
        self.weights_bytes: int = info.weights
        self.isa = library.isa()
        self._own = threading.local()  # workspace: this thread's

    def __repr__(self) -> str:
        classes = f", {self.classes} classes" if self.classes else ""
        return f"<advkd student: {self.size}×{self.size}×{self.channels}{classes}>"

    def generate(
        self,
        num: int,
        seed: int = 0,
        *,
        first: int = 0,
        labels: Label | Sequence[Label] | NDArray[np.integer[Any]] | None = None,
        exit_at: int | None = None,
        dtype: DTypeLike = "uint8",
        threads: int | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Images number `first` .. `first + num - 1` of `seed`: (num, side, side, channels).

        An image depends on the seed and its number alone, but for the rounding of requests of up
        to 3. Pixels are uint8, or with dtype="float32" lie in [-1, 1]. `labels` is a class for all
        images or a sequence of num of them, by number or by name; without it they are drawn from
        the seed. `exit_at` leaves by head 1 .. len(heads), whose images have the side
        heads[exit_at - 1]. `threads` at most take part: by default one for every 16 images, up to
        the processors and to 8. `out`, an array of that shape and dtype in C order, is filled and
        returned.

        ValueError, or TypeError where the type is wrong, names an argument that cannot be.
        """
        import numpy as np

        num, seed, first, head = self._checked(num, seed, first, exit_at)
        numbers = None if labels is None else self._numbers(labels, num)
        shown = _format_of(np.dtype(dtype))
        side = self.heads[head - 1]  # 0 is the last
        shape = (num, side, side, self.channels)
        if threads is None:
            threads = max(1, min(num // WORTHWHILE, _processors(), MOST_THREADS))
        threads = _whole("threads", threads, 1, 1 << 16)
        if out is None:
            out = np.empty(shape, shown)
        else:
            _check_out(out, shape, shown)

        def run(part: slice) -> None:
            request = library.Request(
                seed=seed,
                first=first + part.start,
                count=part.stop - part.start,
                labels=None if numbers is None else numbers[part].ctypes.data,
                exit_at=head,
                format=library.FORMATS[shown],
            )
            workspace = self._workspace(library.workspace_size(self._model, request))
            library.generate(
                self._model, request, workspace.ctypes.data, workspace.nbytes, out[part].ctypes.data
            )

        _map(run, parts_of(num, threads), threads)
        return out

    def generate_bytes(
        self,
        num: int,
        seed: int = 0,
        *,
        first: int = 0,
        label: Label | None = None,
        exit_at: int | None = None,
    ) -> bytes:
        """The bytes of `generate`'s uint8 images, on this thread and without numpy, whose import
        takes longer than some images. `label` is a class for all of them.

        ValueError, or TypeError where the type is wrong, names an argument that cannot be.
        """
        num, seed, first, head = self._checked(num, seed, first, exit_at)
        numbers = None
        if label is not None:
            numbers = (ctypes.c_int64 * num)(*[self.label(label)] * num)
        image = self.heads[head - 1] ** 2 * self.channels
        images = ctypes.create_string_buffer(num * image)
        for part in parts_of(num, 1):
            request = library.Request(
                seed=seed,
                first=first + part.start,
                count=part.stop - part.start,
                labels=None if numbers is None else ctypes.addressof(numbers),
                exit_at=head,
                format=library.FORMATS["uint8"],
            )
            size = library.workspace_size(self._model, request)
            workspace = ctypes.create_string_buffer(size)
            library.generate(
                self._model,
                request,
                ctypes.addressof(workspace),
                size,
                ctypes.addressof(images) + part.start * image,
            )
        return images.raw

    def _checked(
        self, num: int, seed: int, first: int, exit_at: int | None
    ) -> tuple[int, int, int, int]:
        """num, seed, first and the head, 0 for the last, as whole numbers in their ranges."""
        seed = _whole("seed", seed, 0, (1 << 64) - 1)
        first = _whole("first", first, 0, _END - 1)
        num = _whole("num", num, 0, _END - 1 - first)
        head = 0 if exit_at is None else _whole("exit_at", exit_at, 1, len(self.heads))
        return num, seed, first, head

    def label(self, which: Label) -> int:
        """The number of a class, given by its number or its name; ValueError for none of them."""
        if isinstance(which, str):
            names = self.class_names or ()
            if which not in names:
                raise ValueError(f"label {which!r} names no class of this student")
            return names.index(which)
        return _whole("label", which, 0, self.classes - 1)

    def _numbers(self, labels: Any, num: int) -> NDArray[np.int64]:
        """The labels of all images, (num,) int64."""
        import numpy as np

        if self.classes == 0:
            raise ValueError(f"labels={labels!r}: this student takes none")
        if isinstance(labels, str) or np.ndim(labels) == 0:
            return np.full(num, self.label(labels), np.int64)
        if len(labels) != num:
            raise ValueError(f"there are {len(labels)} labels for num={num} images")
        return np.array([self.label(label) for label in labels], np.int64)

    def _workspace(self, size: int) -> NDArray[np.uint8]:
        """At least so many bytes that only this thread uses, and keeps."""
        import numpy as np

        kept: NDArray[np.uint8] | None = getattr(self._own, "workspace", None)
        if kept is None or kept.nbytes < size:
            kept = self._own.workspace = np.empty(size, np.uint8)
        return kept


def load(source: Source) -> Student:
    """The student of a model file, given by its path or as its bytes.

    FileNotFoundError, or another OSError, where there is no such file; ModelError, a ValueError,
    where it is no model.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Student(bytes(source), "the bytes of a model")
    with open(source, "rb") as file:
        return Student(file.read(), os.fspath(source))


def parts_of(num: int, threads: int) -> list[slice]:
    """Parts of a request, as many for each thread, alike in size and as small as PART.

    Those of more than FEW images keep more than FEW, and others are one part.
    """
    rounds = -(-num // (PART * threads))
    count = max(1, min(threads * rounds, num // (FEW + 1)))
    return [slice(num * i // count, num * (i + 1) // count) for i in range(count)]


def _map(run: Callable[[slice], None], parts: Sequence[slice], threads: int) -> None:
    """Runs every part. An exception, Ctrl-C among them, ends it with the parts then running."""
    threads = min(threads, len(parts))
    if threads == 1:
        for part in parts:
            run(part)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, parts):
            pass


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is not a whole number") from None
    if not low <= number <= high:
        raise ValueError(f"{name}={number} is not between {low} and {high}")
    return number


def _format_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype that the library writes."""
    if dtype.name not in library.FORMATS or not dtype.isnative:
        raise ValueError(f"dtype={str(dtype)!r} is neither uint8 nor float32")
    return dtype.name


def _check_out(out: NDArray[Any], shape: tuple[int, ...], dtype: str) -> None:
    """Refuses an array that images of that shape and dtype cannot be written to."""
    import numpy as np

    if not isinstance(out, np.ndarray):
        raise TypeError(f"out is not a numpy array but of {type(out).__name__}")
    if out.shape != shape or out.dtype != np.dtype(dtype):
        raise ValueError(f"out is {out.dtype} {out.shape}, and the images are {dtype} {shape}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("out is read-only or not in C order")
