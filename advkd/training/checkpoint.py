"""Checkpoints of a training: whole or absent, and checked against their own hashes.

A checkpoint is two files, `NAME-STEP.safetensors` and `NAME-STEP.json`. The JSON is written last
and holds the SHA-256 of the tensors and of itself, so it closes the checkpoint.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkd.files import (
    CheckpointError,
    read_json,
    read_tensors,
    seal,
    write_json,
    write_tensors,
)

KEPT = 2  # checkpoints of one training that stay on disk
ADAM = ("step", "exp_avg", "exp_avg_sq")  # the state of a parameter in Adam and AdamW


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `prefix.INDEX.KEY` by the parameter's index."""
    return {
        f"{prefix}.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str, where: Path
) -> None:
    """Set an Adam optimizer's state from what `optimizer_tensors` gave; its settings stay.

    Files hold tensors contiguously; a moment gets its parameter's memory format back, because
    fused optimizers walk parameter, gradient and moments side by side in memory. CheckpointError,
    naming `where` they are from, for tensors that are not the state of these parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(\d{{1,9}})\.(\w+)", name)
        if match is None:
            if name.startswith(f"{prefix}."):
                raise CheckpointError(
                    f"{where} cannot be used: {name:.100} is no optimizer's state"
                )
            continue
        index, key = int(match[1]), match[2]
        if index >= len(parameters) or not _fits(key, value, parameters[index]):
            raise CheckpointError(f"{where} cannot be used: {name:.100} does not fit the optimizer")
        if value.ndim:
            value = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
        state.setdefault(index, {})[key] = value
    for index, found in state.items():
        if len(found) < len(ADAM):
            raise CheckpointError(f"{where} cannot be used: {prefix}.{index} is not complete")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor can be this part of an Adam optimizer's state of a parameter."""
    shape = torch.Size() if key == "step" else parameter.shape
    return key in ADAM and value.shape == shape and value.is_floating_point()


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a training: step, named tensors and plain values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def _stem(name: str, step: int) -> str:
    return f"{name}-{step:08d}"


def save_checkpoint(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; only it and the KEPT - 1 of its name before it stay.

    Everything else of that name goes: later steps, which were passed over as broken, and what a
    crash left half written.
    """
    stem = _stem(name, checkpoint.step)
    sha256 = write_tensors(folder / f"{stem}.safetensors", checkpoint.tensors)
    closing = {"step": checkpoint.step, "sha256": sha256, "values": checkpoint.values}
    write_json(folder / f"{stem}.json", {**closing, "seal": seal(closing)})
    closed = sorted(file.stem for file in folder.glob(f"{name}-*.json"))
    kept = [found for found in closed if found <= stem][-KEPT:]
    for file in _files_of(folder, name):
        if file.stem not in kept:
            file.unlink()


def _files_of(folder: Path, name: str) -> list[Path]:
    return [*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*.tmp")]


class CheckpointWriter:
    """Writes a training's checkpoints from snapshots, in a thread, one at a time.

    The training goes on while a snapshot is serialized, hashed and written. An error of the thread
    is raised by the next call; at the end of `with` it waits until the last one is on disk.
    """

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._memory: dict[str, Tensor] = {}  # of snapshots, which are all alike

    def save(self, checkpoint: Checkpoint) -> None:
        """Take a snapshot and let it be written, once the one before it is."""
        self.wait()
        tensors = {name: self._copied(name, value) for name, value in checkpoint.tensors.items()}
        for device in {value.device for value in checkpoint.tensors.values()}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # its copies are under way
        snapshot = replace(checkpoint, tensors=tensors)
        self._writing = self._pool.submit(save_checkpoint, self._folder, self._name, snapshot)

    def _copied(self, name: str, value: Tensor) -> Tensor:
        memory = self._memory.get(name)
        if memory is None:
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._memory[name] = memory
        return memory.copy_(value.detach(), non_blocking=True)

    def check(self) -> None:
        """Raise the error of the last write, if it has one by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last snapshot is on disk, or raise what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else what ended the training is what matters
                raise
        finally:
            self._pool.shutdown()


def latest_checkpoint(folder: Path, name: str) -> Checkpoint | None:
    """The newest whole checkpoint; a truncated or altered one is passed over with a warning."""
    for closing in sorted(folder.glob(f"{name}-*.json"), reverse=True):
        try:
            content = read_json(closing)
            if content.pop("seal", None) != seal(content):
                raise CheckpointError(f"{closing} is not the file that was written")
            match content:
                case {"step": int(step), "sha256": str(sha256), "values": dict(values)} if (
                    _stem(name, step) == closing.stem
                ):
                    tensors = read_tensors(closing.with_suffix(".safetensors"), sha256)
                    return Checkpoint(step, tensors, values)
            raise CheckpointError(f"{closing} does not describe a checkpoint of its name")
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    return None


def drop_checkpoints(folder: Path, name: str) -> None:
    """Remove a finished training's checkpoints, and the folder once it is empty."""
    for file in _files_of(folder, name):
        file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
