"""What both trainings share: the loop, randomness by step, learning rate, EMA, logs, stopping.

Every random number of a training step comes from a generator seeded with (seed, step), so there
is no random state to carry over: a resumed run repeats the same numbers by construction.
"""

from __future__ import annotations

import abc
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from advkd.console import Interrupted, StopSignals, progress_bar
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


def generator_at(seed: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator that depends on nothing but (seed, step, stream)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**64
    for byte in stream.encode():
        mixed = (mixed ^ byte) * 0x100000001B3 % 2**64
    mixed ^= mixed >> 32  # torch's CPU generator takes the low 32 bits only
    return torch.Generator().manual_seed(mixed % 2**63)


def learning_rate(step: int, base: float, warmup: int, steps: int, final: float) -> float:
    """Linear warm-up to `base`, then a cosine down to `final * base` at the last step."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


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
            restore_optimizer(optimizer, checkpoint.tensors, prefix, where)


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
