"""The loop that both trainings share: steps, logs, checkpoints, stopping and resuming."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advkd import processes
from advkd.config import RunConfig
from advkd.console import StopSignals, progress_bar
from advkd.device import deterministic, tensor_float32
from advkd.errors import Interrupted, TrainingError
from advkd.files import load_strictly, write_bytes
from advkd.parallel import Workers
from advkd.training import settings as device_settings
from advkd.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from advkd.training.ema import Ema
from advkd.training.inputs import Ahead


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

    def write(self, step: int, **values: float) -> dict[str, float]:
        """Append a line, every value to six digits, and return these."""
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        with self.path.open("a") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, **rounded}) + "\n")
        return rounded


Value = float | Tensor  # of a step: a number, or a 0-d tensor that the host has not read


def on_host(values: Sequence[Tensor]) -> list[float]:
    """0-d tensors of one device as numbers, in one transfer: the only wait for a GPU."""
    return torch.stack(list(values)).tolist() if values else []


class Readings:
    """Values of steps, which stay on the device until all of them are read together."""

    def __init__(self, stage: str, latest: Mapping[str, float]):
        """`latest` are those of the steps before; not every step has every one."""
        self._stage, self._latest = stage, dict(latest)
        self._waiting: list[tuple[int, Mapping[str, Value]]] = []

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Keep the values of a step."""
        self._waiting.append((step, values))

    def read(self) -> dict[str, float]:
        """The latest number of each name. TrainingError names the first that is not finite, of all
        steps since the last reading."""
        waiting, self._waiting = self._waiting, []
        tensors = [v for _, of in waiting for v in of.values() if isinstance(v, Tensor)]
        numbers = iter(on_host(tensors))
        for step, values in waiting:
            for name, value in values.items():
                number = next(numbers) if isinstance(value, Tensor) else value
                if not math.isfinite(number):
                    raise TrainingError(
                        f"{name} is {number} at step {step} of stage {self._stage}; the last good "
                        "checkpoint is kept: lower the learning rate (--set, with --redo for this "
                        "stage)"
                    )
                self._latest[name] = number
        return dict(self._latest)


class Training(abc.ABC):
    """What the loop needs of a training: its step, and what a checkpoint of it holds."""

    stage: str  # names its checkpoints, its lines in metrics.jsonl and its progress bar
    device: torch.device
    modules: dict[str, nn.Module]  # a checkpoint names their tensors `KEY.NAME`
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema[Any]
    inputs: Ahead[Any]  # what each step takes from the host

    @abc.abstractmethod
    def step(self, step: int, workers: Workers) -> dict[str, Value]:
        """Carry out one step; returns values to log (not every step needs to have every one).

        On a GPU it waits for nothing: a step with a value that is not finite changes nothing, and
        `Readings` finds it. On a CPU it raises TrainingError.
        """

    @abc.abstractmethod
    def brief(self, values: dict[str, float]) -> dict[str, str]:
        """The few of the values that stand beside the progress bar."""

    def close(self) -> None:
        """End the thread that draws inputs ahead; no further step is then possible."""
        self.inputs.close()

    def update(
        self,
        values: Mapping[str, Tensor],
        step: int,
        optimizers: Sequence[torch.optim.Optimizer],
        averaged: nn.Module,
    ) -> dict[str, Value]:
        """Move weights by their gradients and then the average, and return the step's values.

        Where one of these is not finite nothing moves: on a CPU TrainingError says so at once,
        elsewhere a flag makes the device pass over the step.
        """
        if device_settings.is_host(self.device):
            readings = Readings(self.stage, {})
            readings.add(step, values)
            found: dict[str, Value] = {**readings.read()}
            bad = None
        else:
            found = {**values}
            bad = (~torch.stack(list(values.values())).isfinite().all()).float()
        for optimizer in optimizers:
            if bad is not None:
                optimizer.found_inf = bad  # type: ignore[attr-defined]  # which fused Adam reads
            optimizer.step()
            if bad is not None:
                optimizer.found_inf = None  # type: ignore[attr-defined]
        self.ema.update(averaged, bad)
        return found

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


class Follower(Protocol):
    """Whoever follows a training in its first process, and changes nothing of it."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a line of metrics.jsonl."""

    def stepped(self, step: int, steps: int, network: Any) -> None:
        """Look at the averaged network after a step."""


class Paced(Protocol):
    """The settings of a training that its loop follows."""

    @property
    def steps(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


def _begun(training: Training, folder: Path) -> tuple[int, float, dict[str, float]]:
    """Take over the last checkpoint, if there is one: its step, seconds and values logged last.

    ProcessError where the processes do not all see the same one.
    """
    found = latest_checkpoint(folder, training.stage)
    step = 0 if found is None else found.step
    seen = processes.exchange(str(step))
    if len(set(seen)) > 1:
        other = next(r for r, text in enumerate(seen) if text != seen[0])
        raise processes.ProcessError(
            f"process {other} goes on from step {seen[other]} of stage {training.stage}, process 0 "
            f"from step {seen[0]}: they do not see the same {folder}"
        )
    if found is None:
        return 0, 0.0, {}
    training.restore(found, folder)
    return step, float(found.values["seconds"]), dict(found.values["logged"])


def run_training(
    training: Training,
    run: Path,
    settings: Paced,
    of_run: RunConfig,
    follower: Follower | None = None,
) -> float:
    """Carry a training to its last step, from the start or on from its last checkpoint in `run`.

    Returns the seconds it took, interrupted parts included; the checkpoints stay. Raises
    TrainingError on a value that is not finite and Interrupted after a signal to any process, both
    with the state on disk, which the first process writes.
    """
    stage, folder, steps = training.stage, run / "checkpoints", settings.steps
    start, before, values = _begun(training, folder)
    first, readings = processes.is_first(), Readings(stage, values)
    log = MetricsLog(run / "metrics.jsonl", stage, start) if first else None
    began = time.monotonic()
    with (
        contextlib.closing(training),
        StopSignals() as stop,
        deterministic(training.device),
        tensor_float32(training.device, of_run.tf32),
        Workers(
            of_run.threads,
            training.device,
            settings.accumulate,
            of_run.shares,
            of_run.reduce == "fast",
        ) as workers,
        progress_bar(stage, steps, start) as bar,
        CheckpointWriter(folder, stage) as writer,
    ):
        saved = began
        for done in range(start + 1, steps + 1):
            readings.add(done - 1, training.step(done - 1, workers))
            bar.update()
            writer.check()
            logs = done % settings.log_every == 0 or done == steps
            due = time.monotonic() - saved >= 60 * of_run.checkpoint_minutes
            saves = due and done % settings.checkpoint_every == 0
            stops = processes.any_of(stop.requested)
            saves = saves or stops or done == steps
            if logs or saves:
                values = readings.read()  # the device has done the step, and all before it are good
            seconds = before + time.monotonic() - began
            if logs:
                if log is not None:
                    written = log.write(done, seconds=seconds, **values)
                    if follower is not None:
                        follower.logged(done, written)
                bar.set_postfix(training.brief(values))
            if follower is not None and first:
                follower.stepped(done, steps, training.ema.model)
            if saves:
                if first:
                    writer.save(training.checkpoint(done, seconds, values))
                saved = time.monotonic()
            # Also after the last step: the stages that follow may take minutes.
            if stops:
                writer.wait()
                processes.barrier()  # whoever ends earlier would be missed
                raise Interrupted(f"stopped at step {done} of {steps} of stage {stage}")
    return before + time.monotonic() - began
