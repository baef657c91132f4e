"""Sampling a teacher: x_T from (seed, image index), then one network pass and one update a step.

On the CPU a C++ loop runs all steps of a plan (`advkd.engine`), on a CUDA device one that launches
the captured network (`advkd.engine.cuda`); elsewhere, and for networks that neither takes, the
loop is Python's and the network torch's. Noise is counter-based and has the same bits in all three,
so an image does not depend on the batch it is drawn in. The state is float32; a teacher on a CUDA
device
may be of float16 or bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advkd import ops
from advkd.diffusion import (
    Schedule,
    StepTable,
    ddim_table,
    ddpm_table,
)
from advkd.engine import cache, cuda
from advkd.engine.cpu import Engine
from advkd.engine.cuda import CudaEngine
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.parallel import Workers

SAMPLERS = ("ddim", "ddpm")
TARGETS = ("denoised", "state")

# Seeds from here on are for judging; trajectories, which a student learns from, refuse them.
EVALUATION_SEED = 1 << 63

Callback = Callable[[int, int], None]  # (steps done, steps in all); may raise to stop


def engine_for(
    model: UNet | Student, side: int, images: int, exit_at: int | None = None
) -> Engine | CudaEngine | None:
    """The engine that draws so many images of side x side pixels: a plan on the CPU, a captured
    graph for a teacher on a CUDA device; None where torch draws them."""
    if next(model.parameters()).is_cuda:
        return cuda.engine_for(model, side, images)
    return cache.engine_for(model, side, images, exit_at)


def table_of(schedule: Schedule, sampler: str, steps: int, eta: float) -> StepTable:
    """The step table of a sampler by name: "ddim" in `steps` steps, or "ddpm" in all T."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {SAMPLERS}")
    return ddim_table(schedule, steps, eta) if sampler == "ddim" else ddpm_table(schedule)


def sample_x_T(seed: int, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """x_T ~ N(0, I) of the images `indices` (B,) int64: (B, C, H, W) float32, channels_last."""
    return ops.philox_normal(seed, indices, ops.X_T_STEP, shape, memory_format=torch.channels_last)


def sample_labels(seed: int, indices: Tensor, num_classes: int | None) -> Tensor | None:
    """Class labels of the images `indices`, uniform: (B,) int64; None without classes."""
    return None if num_classes is None else ops.philox_labels(seed, indices, num_classes)


def saved_steps(steps: int, K: int) -> list[int]:
    """Numbers of the K steps after which something is kept: evenly spaced, the last included."""
    return [round(steps * (k + 1) / K) for k in range(K)]


def shape_of(unet: UNet, size: int | None = None) -> tuple[int, int, int]:
    """(C, S, S) of the images a teacher makes; `size` for one whose config names none."""
    side = unet.config.sample_size if size is None else size
    if side is None:
        raise ValueError("this teacher's configuration names no sample_size; give a size")
    return unet.config.in_channels, side, side


@torch.inference_mode()
def sample(
    unet: UNet,
    table: StepTable,
    seed: int,
    indices: Tensor,
    *,
    y: Tensor | None = None,
    keep: Sequence[int] = (),
    target: str = "denoised",
    callback: Callback | None = None,
    size: int | None = None,
) -> list[Tensor]:
    """Run a sampler and return what it kept, each (B, C, H, W) float32, the final sample last.

    `indices` (B,) are image numbers under `seed`; `keep` are numbers of steps (1..N, ascending)
    after which x0_hat (target "denoised") or x_t (target "state") is kept. The final sample is
    always kept, in place of step N's. `callback` is called after every step. All steps run in one
    call of the C++ engine where that can be. Raises ValueError for a target or a step to keep that
    does not exist.
    """
    N = len(table)
    _check_kept(N, keep, target)
    kept = sorted({*keep, N})
    shape = shape_of(unet, size)
    engine = engine_for(unet, shape[-1], len(indices))
    if engine is None:
        return sample_eagerly(
            unet, table, seed, indices, y=y, kept=kept, target=target, callback=callback, size=size
        )
    if isinstance(engine, CudaEngine):
        found = engine.sample(
            table, seed, indices, y, kept=kept, target=target, callback=callback
        )
        return list(found)
    out = torch.empty(len(kept), len(indices), *shape)
    sample_into(
        out.transpose(0, 1), engine, table, seed, indices, y=y, kept=kept, target=target,
        callback=callback,
    )  # fmt: skip
    return list(out)


def _check_kept(N: int, keep: Sequence[int], target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {TARGETS}")
    if any(not a < b for a, b in zip((0, *keep), (*keep, N + 1), strict=True)):
        raise ValueError(f"keep={list(keep)} are not ascending numbers of steps from 1 to {N}")


@torch.inference_mode()
def sample_eagerly(
    unet: UNet,
    table: StepTable,
    seed: int,
    indices: Tensor,
    *,
    y: Tensor | None = None,
    kept: Sequence[int],
    target: str = "denoised",
    callback: Callback | None = None,
    size: int | None = None,
) -> list[Tensor]:
    """The loop in Python: what the engine does, by the network's own modules on its own device."""
    _check_kept(len(table), kept, target)
    indices = indices.to(unet.conv_in.weight.device)
    x_t = sample_x_T(seed, indices, shape_of(unet, size))
    dtype = unet.conv_in.weight.dtype
    found = []
    for i, t in enumerate(table.timesteps.tolist()):
        x_t, x0_hat = ops.sampling_step(
            x_t,
            unet(x_t.to(dtype), t, y).float(),
            table.coefficients[i],
            clip=table.clip,
            seed=seed,
            image_index=indices,
            step=i,
        )
        if i + 1 in kept:
            last = i + 1 == len(table)
            found.append(x0_hat if target == "denoised" and not last else x_t)
        if callback is not None:
            callback(i + 1, len(table))
    return found


def sample_into(
    out: Tensor,
    engine: Engine | CudaEngine,
    table: StepTable,
    seed: int,
    indices: Tensor,
    *,
    y: Tensor | None = None,
    kept: Sequence[int],
    target: str = "denoised",
    threads: int = 0,
    callback: Callback | None = None,
    poll: Callable[[], object] | None = None,
    nan_fill: bool = False,
) -> None:
    """Run a sampler by the engine and write what is kept after the steps `kept` into `out`.

    out: (B, K, C, H, W) float32 or float16, each image (C, H, W) contiguous, so a memory-mapped
    array will do; an image has the same bits whatever else is drawn with it, at any number of
    `threads` (0: as torch has). `poll` is called after each pass over a part of the batch, by the
    thread that made it; what it raises ends the drawing, as Ctrl-C does. `nan_fill` fills the
    engine's memory with NaN before each pass, for tests. On a CUDA device `callback` and `poll` are
    called for some steps at a time, and threads and nan_fill do not matter.
    """
    N, B = len(table), len(indices)
    _check_kept(N, kept, target)
    shape = (B, len(kept), *_image_of(engine))
    dense = (shape[-2] * shape[-1], shape[-1], 1)
    if out.shape != shape or out.stride()[2:] != dense or not out.is_cpu:
        raise ValueError(f"out {tuple(out.shape)} is not {shape} with contiguous images")
    if out.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"out is {out.dtype}, but must be float32 or float16")
    if isinstance(engine, CudaEngine):
        _sample_on_cuda(out, engine, table, seed, indices, y, kept, target, callback, poll)
        return
    engine.check_labels(y, B)
    rows = engine.rows(table.timesteps.tolist())
    coefficients = torch.tensor(table.coefficients, dtype=torch.float64).contiguous()
    indices = indices.to("cpu", torch.int64).contiguous()
    labels = None if y is None else y.contiguous()
    engine.compiled.sample(
        coefficients=coefficients.data_ptr(), conditioning=rows.data_ptr(), steps=N,
        clip=table.clip, seed=seed, purpose=0, image_index=indices.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(), images=B, saved=list(kept),
        save_denoised=target == "denoised", out=out.data_ptr(),
        half=out.dtype is torch.float16, image_stride=out.stride(0), saved_stride=out.stride(1),
        threads=threads or torch.get_num_threads(), on_pass=poll,
        on_step=None if callback is None else lambda done: callback(done, N), nan_fill=nan_fill,
    )  # fmt: skip


def _image_of(engine: Engine | CudaEngine) -> tuple[int, ...]:
    """(C, H, W) of an engine's input."""
    if isinstance(engine, CudaEngine):
        return tuple(engine.loop.buffers.x_t.shape[1:])
    source = engine.plan.buffers[0]
    return source.channels, source.height, source.width


def _sample_on_cuda(
    out: Tensor,
    engine: CudaEngine,
    table: StepTable,
    seed: int,
    indices: Tensor,
    y: Tensor | None,
    kept: Sequence[int],
    target: str,
    callback: Callback | None,
    poll: Callable[[], object] | None,
) -> None:
    def on_step(done: int, steps: int) -> None:
        if poll is not None:
            poll()
        if callback is not None:
            callback(done, steps)

    if len(indices):
        found = engine.sample(
            table, seed, indices, y, kept=kept, target=target, half=out.dtype is torch.float16,
            callback=on_step if callback or poll else None,
        )  # fmt: skip
        out.copy_(found.transpose(0, 1))


def generate(
    model: UNet | Student,
    num: int,
    seed: int,
    steps: int = 50,
    *,
    eta: float = 0.0,
    sampler: str = "ddim",
    y: Tensor | None = None,
    exit_at: int | None = None,
    first: int = 0,
    batch: int = 64,
    threads: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Draw images number `first` .. `first + num - 1` of `seed`: (num, C, H, W) float32 in [-1, 1].

    A student makes each in one pass (`exit_at` leaves early), a teacher by `sampler` in `steps`
    steps. `y` (num,) int64 are labels for a class-conditional model; without them they are drawn
    from the seed. `batch` images are drawn at once, on `threads` threads (0: as many as torch has),
    which the engine shares out within a batch and the plain loop among batches. `callback` is told
    (passes done, passes in all). Raises
    ValueError for what the model cannot do.
    """
    if num < 0 or batch < 1:
        raise ValueError(f"num={num} is negative or batch={batch} below 1")
    if exit_at is not None and isinstance(model, UNet):
        raise ValueError(f"exit_at={exit_at}: only a student can leave early, not a teacher")
    if threads < 0:
        raise ValueError(f"threads={threads} is negative")
    numbers = torch.arange(first, first + num)
    y = _labels(model, seed, numbers, y)
    device = next(model.parameters()).device
    batches = [slice(start, min(start + batch, num)) for start in range(0, num, batch)]
    table = None
    if isinstance(model, UNet):
        table = table_of(model.schedule, sampler, steps, eta)
    total = len(batches) * (1 if table is None else len(table))
    done = 0
    lock = threading.Lock()

    def on_pass(step: int, steps: int) -> None:
        nonlocal done
        with lock:
            done += 1
            if callback is not None:
                callback(done, total)

    def run(part: slice) -> Tensor:
        labels = None if y is None else y[part]
        if engine is not None:
            return _by_engine(engine, table, seed, numbers[part], labels, threads, on_pass)
        labels = None if labels is None else labels.to(device)
        if isinstance(model, UNet):
            assert table is not None
            last = [len(table)]
            return sample_eagerly(
                model, table, seed, numbers[part], y=labels, kept=last, callback=on_pass
            )[-1]
        image = _in_one_pass(model, seed, numbers[part], labels, exit_at)
        on_pass(1, 1)
        return image

    engine = engine_for(model, _shape(model)[-1], min(num, batch), exit_at) if num else None
    if engine is not None:
        images = [run(part) for part in batches]  # all threads work on each
    else:
        with Workers(threads, device) as workers:
            images = list(workers.map(run, batches))
    if not images:
        return torch.empty((0, *_shape(model)))
    return torch.cat(images).cpu().clamp(-1, 1).contiguous()


def _by_engine(
    engine: Engine | CudaEngine,
    table: StepTable | None,
    seed: int,
    indices: Tensor,
    y: Tensor | None,
    threads: int,
    callback: Callback,
) -> Tensor:
    """Images of one batch; without a table in one pass."""
    shape = _image_of(engine)
    if table is None:
        assert isinstance(engine, Engine)
        image = engine.run(sample_x_T(seed, indices, shape), y=y, threads=threads)
        callback(1, 1)
        return image
    out = torch.empty(len(indices), 1, *shape)
    sample_into(
        out, engine, table, seed, indices, y=y, kept=[len(table)], threads=threads,
        callback=callback,
    )  # fmt: skip
    return out[:, 0]


def _labels(model: UNet | Student, seed: int, numbers: Tensor, y: Tensor | None) -> Tensor | None:
    """The labels given, checked; where there are none, drawn for a class-conditional model."""
    classes = model.num_classes if isinstance(model, Student) else model.config.num_class_embeds
    if y is None:
        return sample_labels(seed, numbers, classes)
    if y.shape != numbers.shape:
        raise ValueError(f"y holds {y.numel()} labels for {len(numbers)} images")
    if classes is not None and ((y < 0) | (y >= classes)).any():
        raise ValueError(f"y holds a label that is not one of 0 .. {classes - 1}")
    return y


def _shape(model: UNet | Student) -> tuple[int, int, int]:
    if isinstance(model, Student):
        return model.channels, model.size, model.size
    return shape_of(model)


@torch.inference_mode()
def _in_one_pass(
    student: Student, seed: int, indices: Tensor, y: Tensor | None, exit_at: int | None
) -> Tensor:
    indices = indices.to(next(student.parameters()).device)
    image: Tensor = student(sample_x_T(seed, indices, _shape(student)), y, exit_at)
    return image
