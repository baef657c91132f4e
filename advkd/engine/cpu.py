"""A network as a compiled plan that runs, and what it tells of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student, lower_unet, time_plan
from advkd.engine.plan import (
    ALGORITHMS,
    INPUT,
    OUTPUT,
    Op,
    Part,
    Plan,
)
from advkd.models.layers import timestep_embedding
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops import extension


class Engine:
    """A network as a compiled plan: float32 on the CPU, (B, C, H, W) in and out.

    `plan` is the pass; `time` makes, for a teacher, the rows that tell its passes their times.
    Its weights are copies, so that later changes of the network do not reach it.
    """

    def __init__(self, plan: Plan, time: Plan | None, sinusoids: Callable[[Tensor], Tensor] | None):
        self.plan, self.time = plan, time
        self.compiled = plan.compiled()
        self._time = None if time is None else time.compiled()
        self._sinusoids = sinusoids

    @property
    def name(self) -> str:
        """What decides an image's bits, beside the network and the instruction set."""
        told = json.dumps([(op.kind, op.numbers, op.factor) for op in self.plan.ops])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return f"plan {digest} for batch {self.plan.batch}"

    def rows(self, timesteps: Sequence[int]) -> Tensor:
        """What the passes at these times are told: (N, row) float32."""
        if self._time is None or self._sinusoids is None:
            return torch.zeros(len(timesteps), 0)
        x = self._sinusoids(torch.tensor(timesteps, dtype=torch.int64)).contiguous()
        out = torch.empty(len(timesteps), self.plan.conditioning)
        self._time.run(
            x=x.data_ptr(), y=out.data_ptr(), conditioning=0, labels=0, images=len(timesteps),
            threads=torch.get_num_threads(), nan_fill=False,
        )  # fmt: skip
        return out

    def run(
        self,
        x: Tensor,
        t: int | None = None,
        y: Tensor | None = None,
        *,
        threads: int = 0,
        nan_fill: bool = False,
    ) -> Tensor:
        """One pass: x (B, C, H, W) float32 -> (B, C', H', W'), channels_last.

        t is a teacher's time, y (B,) int64 the labels of a class-conditional network. `threads`
        as torch has them, if 0. `nan_fill` fills the arena with NaN first. ValueError for a shape,
        dtype or label that does not fit.
        """
        self._check(x, y)
        source = self.plan.buffers[INPUT]
        target = self.plan.buffers[OUTPUT]
        if (t is None) != (self.time is None):
            raise ValueError("a teacher needs a time t, and a student takes none")
        row = self.rows([] if t is None else [t])
        dense = x.detach().permute(0, 2, 3, 1).contiguous()
        assert dense.shape[1:] == (source.height, source.width, source.channels)
        out = torch.empty(len(x), target.height, target.width, target.channels)
        labels = None if y is None else y.contiguous()
        self.compiled.run(
            x=dense.data_ptr(), y=out.data_ptr(), conditioning=row.data_ptr(),
            labels=0 if labels is None else labels.data_ptr(), images=len(x),
            threads=threads or torch.get_num_threads(), nan_fill=nan_fill,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def profile(self, images: int, repeats: int = 5) -> list[float]:
        """Seconds of CPU time of each operation at one thread, the least of some repeats."""
        source, target = self.plan.buffers[INPUT], self.plan.buffers[OUTPUT]
        x, y = (torch.zeros(images, b.height, b.width, b.channels) for b in (source, target))
        row = torch.zeros(max(1, self.plan.conditioning))
        labels = torch.zeros(images, dtype=torch.int64)
        seconds: list[float] = self.compiled.profile(
            x=x.normal_().data_ptr(), y=y.data_ptr(), conditioning=row.data_ptr(),
            labels=labels.data_ptr(), images=images, repeats=repeats,
        )  # fmt: skip
        return seconds

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        source = self.plan.buffers[INPUT]
        shape = (source.channels, source.height, source.width)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x {tuple(x.shape)} is not (B, {', '.join(map(str, shape))})")
        if x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"the engine takes float32 on the CPU, not {x.dtype} on {x.device}")
        self.check_labels(y, len(x))

    def check_labels(self, y: Tensor | None, images: int) -> None:
        """ValueError for labels that are missing, superfluous or not (B,) int64."""
        if self.plan.classes and y is None:
            raise ValueError("this network is class-conditional: pass labels y (B,)")
        if not self.plan.classes and y is not None:
            raise ValueError("this network is unconditional: it takes no labels")
        if y is not None and (y.shape != (images,) or y.dtype is not torch.int64 or not y.is_cpu):
            raise ValueError(f"y {tuple(y.shape)} {y.dtype} is not ({images},) int64 on the CPU")


def lower(
    model: UNet | Student,
    size: tuple[int, int],
    *,
    batch: int,
    threads: int = 1,
    exit_at: int | None = None,
) -> Engine:
    """The engine of a network for inputs of `size` (H, W), made for `batch` images at a time.

    Batch and threads decide which algorithm a convolution takes; more images are run in parts of
    `batch`. Raises LoweringError for a module that a plan cannot express, ValueError for a size or
    an `exit_at` that the network does not have.
    """
    if extension is None:
        raise LoweringError("the C++ extension is not installed")
    if batch < 1 or threads < 1:
        raise ValueError(f"batch={batch} and threads={threads} must be positive")
    if isinstance(model, Student):
        if size != (model.size, model.size):
            raise ValueError(f"this student takes {model.size}x{model.size} pixels, not {size}")
        plan = lower_student(model, size, batch, threads, exit_at).plan.finished()
        return Engine(plan, None, None)
    model.check_size(*size)
    low = lower_unet(model, size, batch, threads)
    config = model.config

    def sinusoids(timesteps: Tensor) -> Tensor:
        width = config.block_out_channels[0]
        return timestep_embedding(timesteps, width, config.flip_sin_to_cos, config.freq_shift)

    time = time_plan(low, model)
    return Engine(low.plan.finished(), time, sinusoids)


def describe(engine: Engine, images: int, timed: bool = False) -> Iterator[str]:
    """Lines that tell a plan's operations, their sizes and FLOPs, and the memory of a pass.

    `timed` adds what each takes of this processor, by CPU time at one thread.
    """
    plan = engine.plan
    images = min(images, plan.batch)
    seconds = engine.profile(images) if timed else []
    yield (
        f"{'operation':<15}{'module':<42}{'input':>15}{'output':>15}  {'algorithm':<10}"
        f"{'MFLOP':>9}{'weights, KiB':>14}" + (f"{'us':>10}{'GFLOP/s':>9}" if timed else "")
    )
    for i, op in enumerate(plan.ops):
        read = _shape(op.reads[0]) if op.reads else ""
        flops = op.flops * images
        yield (
            f"{op.kind:<15}{op.module:<42}{read:>15}{_shape(op.writes[0]):>15}  "
            f"{_algorithm(op):<10}{op.flops / 1e6:>9.2f}{op.weights / 256:>14.1f}"
            + (f"{seconds[i] * 1e6:>10.1f}{flops / seconds[i] / 1e9:>9.1f}" if timed else "")
        )
    flops = sum(op.flops for op in plan.ops)
    memory = engine.compiled.bytes(images, plan.threads)
    yield (
        f"{len(plan.ops)} operations, {flops / 1e9:.3f} GFLOP an image; weights "
        f"{plan.weights.numel() / 2**18:.1f} MiB; a pass of {images} takes "
        f"{memory / 2**20:.1f} MiB; made for batch {plan.batch}"
    )
    if timed:
        total = sum(seconds)
        yield f"{total * 1e3:.3f} ms a pass, {flops * images / total / 1e9:.1f} GFLOP/s; of which"
        yield from _shares(plan.ops, images, seconds)


def _shares(ops: Sequence[Op], images: int, seconds: Sequence[float]) -> Iterator[str]:
    """The share of a pass of each kind of operation, convolutions by their algorithm and kernel."""

    def kind(op: Op) -> str:
        kernel = op.numbers.get("kernel")
        square = "" if kernel is None else f" {kernel}x{kernel}, {_algorithm(op)}"
        return op.kind + square

    total = sum(seconds)
    for name in dict.fromkeys(map(kind, ops)):
        of_kind = [i for i, op in enumerate(ops) if kind(op) == name]
        part = sum(seconds[i] for i in of_kind)
        flops = images * sum(ops[i].flops for i in of_kind)
        yield f"  {name:<30}{part / total:>6.1%}{flops / part / 1e9:>9.1f} GFLOP/s"


def _algorithm(op: Op) -> str:
    return ALGORITHMS[op.numbers["algorithm"]] if op.kind == "convolution" else ""


def _shape(part: Part) -> str:
    return f"{part.height}x{part.width}x{part.channels}"
