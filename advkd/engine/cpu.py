"""The CPU engine: a network as a compiled plan, run by the C++ executor and its sampling loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from advkd.diffusion import StepTable
from advkd.engine.interface import (
    Engine,
    OnStep,
    check_labels,
    check_out,
    check_plain,
    check_saved,
    input_shape,
    patched,
)
from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student, lower_unet, time_plan
from advkd.engine.noise import Noise
from advkd.engine.plan import ALGORITHMS, INPUT, OUTPUT, Op, Part, Plan
from advkd.models.layers import timestep_embedding
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops import address, extension
from advkd.ops._backend import cpu_unavailable

FLOAT = torch.float32

# Images of a pass for which the engine of few images, and that of many, is made.
_FEW, _MANY = 1, 16


class CpuEngine(Engine):
    """A network as a compiled plan: float32 on the CPU, (B, C, H, W) in and out.

    `plan` is the network pass; `time` makes, for a teacher, the conditioning of its passes from
    their times. The weights are copies, so later changes of the network do not reach it. An image
    has the same bits in any batch and at any number of threads.
    """

    reads_in_place = False

    def __init__(self, plan: Plan, time: Plan | None, sinusoids: Callable[[Tensor], Tensor] | None):
        self.plan, self.time = plan, time
        self.compiled = plan.compiled()
        self._time = None if time is None else time.compiled()
        self._sinusoids = sinusoids
        source = plan.buffers[INPUT]
        self.shape = (source.channels, source.height, source.width)
        self.classes = plan.classes or None

    @classmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        """Why the C++ executor cannot run the network: it is missing, the network is on another
        device, of another dtype, or a program has replaced one of its methods."""
        method = patched(model)
        if method is not None:
            return f"{method} has been replaced, and a plan would not call it"
        return cpu_unavailable(*model.parameters(), *model.buffers())

    @classmethod
    def batch_for(cls, images: int) -> int:
        """One at a time for up to three images, else sixteen: they differ in their algorithms."""
        return _FEW if images <= 3 * _FEW else _MANY

    @classmethod
    def make(
        cls, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None
    ) -> CpuEngine:
        """See `Engine.make`."""
        return lower(model, size, batch=batch, exit_at=exit_at)

    @property
    def name(self) -> str:  # type: ignore[override]
        """What decides an image's bits, beside the network and the instruction set."""
        content = json.dumps([(op.kind, op.numbers, op.factor) for op in self.plan.ops])
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return f"plan {digest} for batch {self.plan.batch}"

    def conditioning(self, timesteps: Sequence[int]) -> Tensor:
        """What the plan reads beside its input, for passes at these times: (N, R) float32."""
        N, R = len(timesteps), self.plan.conditioning
        out = torch.empty((N, R), dtype=torch.float32, device="cpu")
        if self._time is None or self._sinusoids is None:
            return out
        x = self._sinusoids(torch.tensor(timesteps, dtype=torch.int64, device="cpu")).contiguous()
        self._time.run(
            x=address(x, FLOAT), y=address(out, FLOAT), conditioning=0, labels=0, images=N,
            threads=torch.get_num_threads(), nan_fill=False,
        )  # fmt: skip
        return out

    def run(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        t: int | None = None,
        threads: int = 0,
        nan_fill: bool = False,
    ) -> Tensor:
        """See `Engine.run`; the result is channels_last. `nan_fill` fills the arena first."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x {tuple(x.shape)} is not (B, {', '.join(map(str, self.shape))})")
        if x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"the engine takes float32 on the CPU, not {x.dtype} on {x.device}")
        if (t is None) != (self.time is None):
            raise ValueError("a teacher needs a time t, and a student takes none")
        labels = self._labels(y, len(x))
        conditioning = self.conditioning([] if t is None else [t])
        dense = x.detach().permute(0, 2, 3, 1).contiguous()
        target = self.plan.buffers[OUTPUT]
        out = _floats(len(x), target.height, target.width, target.channels)
        self.compiled.run(
            x=address(dense, FLOAT), y=address(out, FLOAT),
            conditioning=address(conditioning, FLOAT),
            labels=0 if labels is None else address(labels, torch.int64), images=len(x),
            threads=threads or torch.get_num_threads(), nan_fill=nan_fill,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def images(
        self, noise: Noise, first: int, num: int, y: Tensor | None = None, *, threads: int = 0
    ) -> Tensor:
        """See `Engine.images`: labels, noise and passes in one call of C++."""
        noise.check()
        labels = None if y is None else self._labels(y, num)
        target = self.plan.buffers[OUTPUT]
        out = _floats(num, target.channels, target.height, target.width)
        self.compiled.student_images(
            seed=noise.seed, purpose=noise.purpose, first=first, images=num,
            labels=0 if labels is None else address(labels, torch.int64), out=address(out, FLOAT),
            threads=threads or torch.get_num_threads(),
        )  # fmt: skip
        return out

    @torch.inference_mode()
    def sample(
        self,
        table: StepTable,
        noise: Noise,
        indices: Tensor,
        y: Tensor | None = None,
        *,
        saved: Sequence[int],
        target: str = "denoised",
        out: Tensor | None = None,
        threads: int = 0,
        on_step: OnStep | None = None,
        poll: Callable[[], object] | None = None,
        nan_fill: bool = False,
    ) -> Tensor:
        """See `Engine.sample`: all steps in one call of C++; a memory-mapped `out` will do.

        `poll` is called after each pass over a part of the batch, by the thread that made it; what
        it raises ends the sampling, as Ctrl-C does.
        """
        N, B = len(table), len(indices)
        check_plain(table)
        check_saved(N, saved, target)
        check_out(out, B, len(saved), self.shape)
        labels = self._labels(y, B)
        if out is None:
            out = _floats(B, len(saved), *self.shape)
        conditioning = self.conditioning(table.timesteps.tolist())
        coefficients = torch.tensor(table.coefficients, dtype=torch.float64, device="cpu")
        numbers = indices.to("cpu", torch.int64).contiguous()
        self.compiled.sample(
            coefficients=address(coefficients, torch.float64),
            conditioning=address(conditioning, FLOAT),
            steps=N, clip=table.clip, seed=noise.seed, purpose=int(noise.purpose),
            image_index=address(numbers, torch.int64),
            labels=0 if labels is None else address(labels, torch.int64), images=B,
            saved=list(saved), save_denoised=target == "denoised", out=address(out, out.dtype),
            half=out.dtype is torch.float16, image_stride=out.stride(0), saved_stride=out.stride(1),
            threads=threads or torch.get_num_threads(), on_pass=poll,
            on_step=None if on_step is None else lambda done: on_step(done, N), nan_fill=nan_fill,
        )  # fmt: skip
        return out

    def profile(self, images: int, repeats: int = 5) -> list[float]:
        """Seconds of CPU time of each operation at one thread, the least of some repeats."""
        source, target = self.plan.buffers[INPUT], self.plan.buffers[OUTPUT]
        x, y = (_floats(images, b.height, b.width, b.channels) for b in (source, target))
        conditioning = _floats(max(1, self.plan.conditioning)).zero_()
        labels = torch.zeros(images, dtype=torch.int64, device="cpu")
        seconds: list[float] = self.compiled.profile(
            x=address(x.normal_(), FLOAT), y=address(y, FLOAT),
            conditioning=address(conditioning, FLOAT),
            labels=address(labels, torch.int64), images=images, repeats=repeats,
        )  # fmt: skip
        return seconds

    def _labels(self, y: Tensor | None, images: int) -> Tensor | None:
        """The labels, checked, as the executor reads them."""
        check_labels(y, images, self.classes)
        return None if y is None else y.to("cpu", torch.int64).contiguous()


def _floats(*shape: int) -> Tensor:
    """An unwritten float32 tensor on the CPU, whatever a program's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def lower(
    model: UNet | Student,
    size: tuple[int, int],
    *,
    batch: int,
    threads: int = 1,
    exit_at: int | None = None,
) -> CpuEngine:
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
        input_shape(model, size)
        low = lower_student(model, size, batch, threads, exit_at)
        return CpuEngine(low.plan.finished(), None, None)
    model.check_size(*size)
    low = lower_unet(model, size, batch, threads)
    config = model.config

    def sinusoids(timesteps: Tensor) -> Tensor:
        width = config.block_out_channels[0]
        return timestep_embedding(timesteps, width, config.flip_sin_to_cos, config.freq_shift)

    time = time_plan(low, model)
    engine = CpuEngine(low.plan.finished(), time, sinusoids)
    engine.schedule = model.schedule
    return engine


def describe(engine: CpuEngine, images: int, timed: bool = False) -> Iterator[str]:
    """Lines that list a plan's operations, their sizes and FLOPs, and the memory of a pass.

    `timed` adds the CPU time of each on this processor, at one thread.
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
    """The share of a pass of each kind of operation."""
    total = sum(seconds)
    for name in dict.fromkeys(map(kind_of, ops)):
        of_kind = [i for i, op in enumerate(ops) if kind_of(op) == name]
        part = sum(seconds[i] for i in of_kind)
        flops = images * sum(ops[i].flops for i in of_kind)
        yield f"  {name:<30}{part / total:>6.1%}{flops / part / 1e9:>9.1f} GFLOP/s"


def kind_of(op: Op) -> str:
    """An operation's kind, a convolution's with its kernel and algorithm."""
    kernel = op.numbers.get("kernel")
    return op.kind if kernel is None else f"{op.kind} {kernel}x{kernel}, {_algorithm(op)}"


def _algorithm(op: Op) -> str:
    return ALGORITHMS[op.numbers["algorithm"]] if op.kind == "convolution" else ""


def _shape(part: Part) -> str:
    return f"{part.height}x{part.width}x{part.channels}"
