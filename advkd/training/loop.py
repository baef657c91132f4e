"""The loop that both trainings share: steps, logs, checkpoints, stopping and resuming."""

from __future__ import annotations

import abc
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from advkd.console import Interrupted, StopSignals, progress_bar
from advkd.device import deterministic
from advkd.files import load_strictly, write_bytes
from advkd.parallel import Workers
from advkd.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


class TrainingError(RuntimeError):
    """A training that cannot go on; the message names the step and what to do."""


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line. Opening it cuts a stage back to step `start`."""

    def __init__(self, path: Path, stage: str, start: int):
        self.path, self.stage = path, stage
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            remaining = [line for line in lines if self._remains(line, start)]
            write_bytes(path, "".join(f"{line}\n" for line in remaining).encode())
        path.parent.mkdir(parents=True, exist_ok=True)

    def _remains(self, line: str, start: int) -> bool:
        try:
            entry = json.loads(line)
            return bool(entry["stage"] != self.stage or entry["step"] <= start)
        except (ValueError, KeyError, TypeError):
            return False  # a line that a crash cut short

    def write(self, step: int, **values: float) -> None:
        """Append a line, every value to six digits."""
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        with self.path.open("a") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, **rounded}) + "\n")


def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Named 0-d tensors of one device as numbers, in one transfer: a step's only wait for a GPU."""
    numbers: list[float] = torch.stack(list(values.values())).tolist()
    return dict(zip(values, numbers, strict=True))


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

    def read_finite(self, values: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """A step's values as numbers; TrainingError names the first that is not finite."""
        numbers = on_host(values)
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise TrainingError(
                    f"{name} is {number} at step {step} of stage {self.stage}; the last good "
                    "checkpoint is kept: lower the learning rate (--set, with --redo for this "
                    "stage)"
                )
        return numbers

    def checkpoint(self, step: int, seconds: float, logged: dict[str, float]) -> Checkpoint:
        """All of the training's state after `step` steps, and the values logged last."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }
        for prefix, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(optimizer, prefix)
        return Checkpoint(step, tensors, {"seconds": seconds, "logged": logged})

    def restore(self, checkpoint: Checkpoint, where: Path) -> None:
        """Take over a checkpoint's state; CheckpointError if its networks are not these."""
        for prefix, module in self.modules.items():
            own = {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in checkpoint.tensors.items()
                if name.startswith(f"{prefix}.")
            }
            load_strictly(module, own, where)
        for prefix, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint.tensors, prefix, where)


def run_training(
    training: Training, run: Path, steps: int, log_every: int, checkpoint_every: int, threads: int
) -> float:
    """Carry a training to its last step, from the start or on from its last checkpoint in `run`.

    Returns the seconds it took, interrupted parts included; the checkpoints stay. Raises
    TrainingError on a value that is not finite and Interrupted after a signal, both with the state
    on disk.
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
        deterministic(training.device),
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
            if stop.requested:  # also after the last step: the stages that follow may take minutes
                raise Interrupted(f"stopped at step {done} of {steps} of stage {stage}")
    return before + time.monotonic() - began
