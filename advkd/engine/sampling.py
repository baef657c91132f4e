"""Sampling by name: step tables, and images of a teacher or a student in batches.

Noise is counter-based, so an image depends on the seed and its number alone, not on the batch it is
sampled in. The state of a sampler is float32, also for a teacher of half precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from advkd.diffusion import Schedule, StepTable, ddim_table, ddpm_table
from advkd.engine.cache import engine_for
from advkd.engine.cuda import images_that_fill
from advkd.engine.interface import Engine, check_labels, input_shape
from advkd.engine.noise import MAX_STEPS, Noise, Purpose
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.names import SAMPLERS

Callback = Callable[[int, int], object]  # (network passes done, passes in all); may raise to stop


def table_of(schedule: Schedule, sampler: str, steps: int, eta: float) -> StepTable:
    """The step table of a sampler by name: "ddim" in `steps` steps, or "ddpm" in all T.

    Raises ValueError for a sampler, a number of steps or an eta that cannot be.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {SAMPLERS}")
    table = ddim_table(schedule, steps, eta) if sampler == "ddim" else ddpm_table(schedule)
    if len(table) > MAX_STEPS:
        raise ValueError(f"a sampler has at most {MAX_STEPS} steps, not {len(table)}")
    return table


def saved_steps(steps: int, K: int) -> list[int]:
    """Numbers of the K steps after which a target is saved: evenly spaced, the last included."""
    return [round(steps * (k + 1) / K) for k in range(K)]


def generate(
    model: UNet | Student | Engine,
    num: int,
    seed: int,
    steps: int = 50,
    *,
    eta: float = 0.0,
    sampler: str = "ddim",
    y: Tensor | None = None,
    exit_at: int | None = None,
    size: int | None = None,
    first: int = 0,
    batch: int | None = None,
    threads: int = 0,
    purpose: Purpose = Purpose.SAMPLING,
    callback: Callback | None = None,
) -> Tensor:
    """Sample images number `first` .. `first + num - 1` of `seed`: (num, C, H, W) float32 on the
    CPU, in [-1, 1].

    A student makes each in one network pass (`exit_at` leaves early), a teacher by `sampler` in
    `steps` steps. `y` (num,) int64 are labels for a class-conditional model; without them they are
    sampled from the seed. `size` is the pixels of a side, for a teacher whose configuration names
    none. `batch` images are sampled at once (None: 64, or on CUDA as many as fill a GPU), on
    `threads` threads (0: as many as torch has).
    `model` may be an engine of `advkd.compile`. Raises ValueError for what the model cannot do.
    """
    if batch is None:
        batch = usual_batch(model, size)
    _check_numbers(num, first, batch, threads)
    noise = Noise(seed, purpose)
    schedule = None if isinstance(model, Student) else model.schedule
    table = None if schedule is None else table_of(schedule, sampler, steps, eta)
    engine = _engine_of(model, min(num, batch), exit_at, size, table)
    if y is not None:
        check_labels(y, num, engine.classes)
    parts = [slice(start, min(start + batch, num)) for start in range(0, num, batch)]
    passes = _Counter(len(parts) * (1 if table is None else len(table)), callback)

    def sample(part: slice) -> Tensor:
        labels = None if y is None else y[part]
        if table is None:
            number, count = first + part.start, part.stop - part.start
            images = engine.images(noise, number, count, labels, threads=threads)
            passes.add()
            return images
        numbers = torch.arange(first + part.start, first + part.stop, device="cpu")
        if labels is None:
            labels = noise.labels(numbers, engine.classes)
        last = [len(table)]
        images = engine.sample(
            table, noise, numbers, labels, saved=last, threads=threads, on_step=passes.add
        )
        return images[:, 0].cpu().clamp(-1, 1).contiguous()

    images = list(engine.map(sample, parts, threads))
    if not images:
        return torch.empty((0, *engine.shape), dtype=torch.float32, device="cpu")
    return images[0] if len(images) == 1 else torch.cat(images)


def usual_batch(model: UNet | Student | Engine, size: int | None = None) -> int:
    """How many images are sampled at once: 64, or on a GPU what fills one, which is more for small
    images (`size` pixels a side, for a teacher whose configuration names none)."""
    on = model.device if isinstance(model, Engine) else next(model.parameters()).device
    if on.type != "cuda":
        return 64
    if isinstance(model, Engine):
        shape = model.shape
    else:
        shape = input_shape(model, None if size is None else (size, size))
    return images_that_fill(shape[1] * shape[2])


def _check_numbers(num: int, first: int, batch: int, threads: int) -> None:
    if num < 0 or batch < 1:
        raise ValueError(f"num={num} is negative or batch={batch} below 1")
    if threads < 0:
        raise ValueError(f"threads={threads} is negative")
    if not 0 <= first <= first + num < 1 << 63:
        raise ValueError(f"images {first} to {first + num - 1} are not numbered from 0 to 2^63 - 1")


def _engine_of(
    model: UNet | Student | Engine,
    images: int,
    exit_at: int | None,
    size: int | None,
    table: StepTable | None,
) -> Engine:
    if isinstance(model, Engine):
        if exit_at is not None or size is not None:
            raise ValueError("exit_at and size are settled when an engine is made: advkd.compile")
        return model
    if exit_at is not None and isinstance(model, UNet):
        raise ValueError(f"exit_at={exit_at}: only a student can leave early, not a teacher")
    sides = None if size is None else (size, size)
    return engine_for(model, images, size=sides, exit_at=exit_at, table=table)


class _Counter:
    """Network passes done, counted by any thread, for a callback."""

    def __init__(self, total: int, callback: Callback | None):
        self._total, self._callback = total, callback
        self._done = 0
        self._lock = threading.Lock()

    def add(self, *step: int) -> None:
        with self._lock:
            self._done += 1
            if self._callback is not None:
                self._callback(self._done, self._total)
