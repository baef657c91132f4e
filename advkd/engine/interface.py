"""What every engine is: a network made ready to sample. Who calls one never asks which it is."""

from __future__ import annotations

import abc
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from advkd.config import TARGETS
from advkd.diffusion import Schedule, StepTable
from advkd.engine.noise import Noise
from advkd.models.student import Student
from advkd.models.unet import UNet

Item = TypeVar("Item")
Result = TypeVar("Result")

OnStep = Callable[[int, int], object]  # (steps done, steps in all); may raise to stop


class Engine(abc.ABC):
    """A teacher or a student for inputs of one size. An engine is a file that subclasses this and
    an entry of `advkd.engine.cache.ENGINES`.

    Noise is counter-based: an image depends on (seed, purpose, image number) alone, not on the
    batch it is sampled in.
    """

    reads_in_place: bool  # whether new values of the weights need no new engine
    name: str  # of what decides an image's last bits, beside network and instruction set
    shape: tuple[int, int, int]  # (C, H, W) of x_T
    classes: int | None  # None: takes no labels
    schedule: Schedule | None = None  # the noise schedule of a teacher; a student has none
    network: UNet | Student | None = None  # kept alive by an engine that a user holds

    @property
    def device(self) -> torch.device:
        """Where it computes, and where noise for it is best made."""
        return torch.device("cpu")

    @classmethod
    @abc.abstractmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        """Why this engine cannot run the network, as a clause; None where it can."""

    @classmethod
    @abc.abstractmethod
    def batch_for(cls, images: int) -> int:
        """The batch size to make an engine for, to sample so many images at once (>= 1)."""

    @classmethod
    @abc.abstractmethod
    def make(
        cls, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None
    ) -> Engine:
        """The engine for inputs of `size` (H, W); `exit_at`: the student's head to leave by.

        Raises LoweringError where this engine cannot express the network after all, ValueError for
        a size or an `exit_at` that the network does not have.
        """

    @abc.abstractmethod
    def run(
        self, x: Tensor, y: Tensor | None = None, *, t: int | None = None, threads: int = 0
    ) -> Tensor:
        """One network pass: x (B, C, H, W) float32 -> (B, C', H', W') float32.

        y (B,) int64 are labels for a class-conditional network, t is a teacher's time. `threads`:
        0 as many as torch has. Raises ValueError for a shape, dtype or label that does not fit.
        """

    @abc.abstractmethod
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
    ) -> Tensor:
        """Run a teacher's sampler over the images `indices` (B,) int64 and return what it saves.

        `saved` are numbers of steps (1 .. N, ascending) after which the target is saved: x0_hat
        ("denoised") or x_t ("state"); after step N it is the final sample either way. `out`
        (B, K, C, H, W) float32 or float16, each image contiguous, takes the targets and is
        returned; without it the result is a new float32 tensor on the network's device. `on_step`
        is called after every step, `poll` at least as often; what they raise ends the sampling.
        Raises ValueError for a target, a step or labels that do not fit.
        """

    def images(
        self, noise: Noise, first: int, num: int, y: Tensor | None = None, *, threads: int = 0
    ) -> Tensor:
        """Images number `first` .. `first + num - 1` of a student: (num, C, H, W) float32 on the
        CPU, contiguous, in [-1, 1]. y (num,) int64 are labels for a class-conditional one; without
        them they are sampled from the noise. Raises ValueError for a label that does not fit.
        """
        numbers = torch.arange(first, first + num, dtype=torch.int64, device="cpu")
        if y is None:
            y = noise.labels(numbers, self.classes)
        x_T = noise.x_T(numbers.to(self.device), self.shape)
        return self.run(x_T, y, threads=threads).cpu().clamp(-1, 1).contiguous()

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0
    ) -> Iterator[Result]:
        """Apply `function` to batches, in order: one after another where each takes all threads."""
        return map(function, items)


def check_plain(table: StepTable) -> None:
    """ValueError for a sampler that takes more than six numbers a step."""
    if not table.is_plain:
        raise ValueError(
            "thresholding and learned variances are sampled by the eager engine alone: pass the "
            "teacher itself, not an engine of it"
        )


def check_saved(steps: int, saved: Sequence[int], target: str) -> None:
    """ValueError unless `saved` are ascending numbers of steps and the target exists."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {TARGETS}")
    if any(not a < b for a, b in zip((0, *saved), (*saved, steps + 1), strict=True)):
        raise ValueError(f"saved={list(saved)} are not ascending numbers of steps, 1 to {steps}")


def check_out(out: Tensor | None, B: int, K: int, shape: tuple[int, int, int]) -> None:
    """ValueError unless `out`, where it is given, is (B, K, *shape) of contiguous images on the
    CPU, float32 or float16."""
    if out is None:
        return
    C, H, W = shape
    if out.shape != (B, K, C, H, W) or out.stride()[2:] != (H * W, W, 1) or not out.is_cpu:
        raise ValueError(f"out {tuple(out.shape)} is not {(B, K, C, H, W)} with contiguous images")
    if out.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"out is {out.dtype}, but must be float32 or float16")


def input_shape(model: UNet | Student, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network makes; `size` for a teacher whose config names none.

    Raises ValueError for a size that the network does not have, and for a teacher whose output has
    other channels than its input: it cannot be sampled.
    """
    if isinstance(model, Student):
        own: int | None = model.size
        channels = model.channels
    else:
        own, channels = model.config.sample_size, model.config.in_channels
        if model.config.out_channels != channels and not model.learns_variance:
            raise ValueError(
                f"this teacher takes {channels} channels and gives {model.config.out_channels}, "
                f"which no sampler can use: {2 * channels} would be a prediction and its variance, "
                "if scheduler_config.json had variance_type='learned_range'"
            )
    if size is None:
        if own is None:
            raise ValueError("this teacher's configuration names no sample_size; give a size")
        size = (own, own)
    if isinstance(model, Student):
        if size != (own, own):
            raise ValueError(f"this student takes {own}x{own} pixels, not {size[0]}x{size[1]}")
    else:
        model.check_size(*size)
    return channels, *size


def check_labels(y: Tensor | None, images: int, classes: int | None) -> None:
    """ValueError for labels that are missing, superfluous, out of range or not (B,) int64."""
    if classes and y is None:
        raise ValueError("this network is class-conditional: pass labels y (B,)")
    if not classes and y is not None:
        raise ValueError("this network is unconditional: it takes no labels")
    if y is None or classes is None:
        return
    if y.shape != (images,) or y.dtype is not torch.int64:
        raise ValueError(f"y {tuple(y.shape)} {y.dtype} is not ({images},) int64")
    if not len(y):
        return
    low, high = (int(bound) for bound in y.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"label {low if low < 0 else high} is not one of 0 .. {classes - 1}")


def patched(model: nn.Module) -> str | None:
    """The name of a method of the network or of one of its modules that a program has replaced, on
    the object or on its class; None where all are as they were written."""
    for name, module in model.named_modules():
        method = replaced_method(module)
        if method is not None:
            owner = name or "the network" if method in vars(module) else type(module).__name__
            return f"{owner}.{method}"
    return None


def replaced_method(module: nn.Module) -> str | None:
    """The name of a method that was replaced, on the module itself or on its class; None if none.

    Libraries that patch networks do so by assignment: `module.forward = f` or `Kind.forward = f`.
    """
    kind = type(module)
    for attribute in vars(module):
        if callable(getattr(kind, attribute, None)):
            return attribute
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        # Of torch's own classes, the one method that an engine stands in for.
        names = vars(base) if base.__module__.startswith("advkd.") else ("forward",)
        for attribute in names:
            if _is_replaced(base, attribute):
                return attribute
    return None


def _is_replaced(kind: type, attribute: str) -> bool:
    """Whether a method that stands in a class was written elsewhere."""
    method = vars(kind).get(attribute)
    return isinstance(method, types.FunctionType) and (
        method.__qualname__ != f"{kind.__qualname__}.{attribute}"
        or method.__module__ != kind.__module__
        or hasattr(method, "__wrapped__")
    )
