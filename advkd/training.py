"""What both trainings share: the loop, randomness by step, learning rate, EMA, logs, stopping.

Every random number of a training step comes from a generator seeded with (seed, step), so there
is no random state to carry over: a resumed run repeats the same numbers by construction.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from advkd.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_strictly,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    write_bytes,
)
from advkd.parallel import Workers

Network = TypeVar("Network", bound=nn.Module)


class TrainingError(RuntimeError):
    """A training that cannot go on; the message names the step and what to do."""


class Interrupted(RuntimeError):
    """A training that was asked to stop and has saved its state."""


def generator_at(seed: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator that depends on nothing but (seed, step, stream)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**64
    for byte in stream.encode():
        mixed = (mixed ^ byte) * 0x100000001B3 % 2**64
    mixed ^= mixed >> 32  # torch's CPU generator takes the low 32 bits only
    return torch.Generator().manual_seed(mixed % 2**63)


def pick_device(name: str) -> torch.device:
    """The device that `run.device` means; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(mode: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast: "on", "off", or "auto" where the hardware computes in bfloat16."""
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"autocast={mode!r} is not one of auto, on, off")
    if mode == "auto":
        has = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        mode = "on" if has else "off"
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "on")


def learning_rate(step: int, base: float, warmup: int, steps: int, final: float) -> float:
    """Linear warm-up to `base`, then a cosine down to `final * base` at the last step."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Ema(Generic[Network]):
    """An exponential moving average of a network's parameters; `model` is what is kept.

    The decay grows from 0.1 to `decay`, so that the initial weights are forgotten early.
    """

    def __init__(self, model: Network, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Network, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line. Opening it cuts a stage back to step `start`."""

    def __init__(self, path: Path, stage: str, start: int):
        self.path, self.stage = path, stage
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if self._keeps(line, start)]
            write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
        path.parent.mkdir(parents=True, exist_ok=True)

    def _keeps(self, line: str, start: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # a line that a crash cut short
        return bool(entry["stage"] != self.stage or entry["step"] <= start)

    def write(self, step: int, **values: float) -> None:
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        with self.path.open("a") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, **rounded}) + "\n")


class StopSignals:
    """Within `with`: SIGINT and SIGTERM set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def progress_bar(stage: str, total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A tqdm bar with the stage's name; silent where stderr is not a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=f"{stage:<12}",
        unit=f" {unit}",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


def check_finite(name: str, value: Tensor, step: int) -> float:
    """The value as a float; TrainingError if it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise TrainingError(
            f"{name} is {number} at step {step}; the last good checkpoint is kept: "
            "lower the learning rate (--set, with --redo for this stage)"
        )
    return number


class Training(abc.ABC):
    """What the loop needs of a training: its step, and what a checkpoint of it holds."""

    stage: str  # names its checkpoints, its lines in metrics.jsonl and its progress bar
    device: torch.device
    modules: dict[str, nn.Module]  # a checkpoint names their tensors `KEY.NAME`
    optimizers: dict[str, torch.optim.Optimizer]

    @abc.abstractmethod
    def step(self, step: int, workers: Workers) -> dict[str, float]:
        """Carry out one step; returns values to log (not every step needs to have every one)."""

    @abc.abstractmethod
    def brief(self, values: dict[str, float]) -> dict[str, str]:
        """The few of the values that stand beside the progress bar."""

    def checkpoint(self, step: int, seconds: float, logged: dict[str, float]) -> Checkpoint:
        """All of the training's state after `step` steps, and what was logged last."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }
        for prefix, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(optimizer, prefix)
        return Checkpoint(step, tensors, {"seconds": seconds, "logged": logged})

    def restore(self, checkpoint: Checkpoint, where: Path) -> None:
        """Undo `checkpoint`; CheckpointError if it is of other networks."""
        for prefix, module in self.modules.items():
            own = {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in checkpoint.tensors.items()
                if name.startswith(f"{prefix}.")
            }
            load_strictly(module, own, where)
        for prefix, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint.tensors, prefix)


def run_training(
    training: Training, run: Path, steps: int, log_every: int, checkpoint_every: int, threads: int
) -> float:
    """Carry a training to its last step, from the start or on from its last checkpoint in `run`.

    Returns its seconds, earlier sessions included; the checkpoints stay. Raises TrainingError on
    a value that is not finite and Interrupted after a signal, both with the state on disk.
    """
    stage, folder = training.stage, run / "checkpoints"
    start, before = 0, 0.0
    values: dict[str, float] = {}
    found = latest_checkpoint(folder, stage)
    if found is not None:
        training.restore(found, folder)
        start, before = found.step, float(found.values["seconds"])
        values |= found.values["logged"]  # not every step computes every one
    log = MetricsLog(run / "metrics.jsonl", stage, start)
    began = time.monotonic()
    with (
        StopSignals() as stop,
        Workers(threads, training.device) as workers,
        progress_bar(stage, steps, start) as bar,
    ):
        for done in range(start + 1, steps + 1):
            values |= training.step(done - 1, workers)
            bar.update()
            seconds = before + time.monotonic() - began
            if done % log_every == 0 or done == steps:
                log.write(done, seconds=seconds, **values)
                bar.set_postfix(training.brief(values))
            if done % checkpoint_every == 0 or stop.requested or done == steps:
                save_checkpoint(folder, stage, training.checkpoint(done, seconds, values))
            if stop.requested:  # also after the last step: what follows may take minutes
                raise Interrupted(f"stopped at step {done} of {steps} of stage {stage}")
    return before + time.monotonic() - began
