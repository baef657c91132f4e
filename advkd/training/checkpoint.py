"""Checkpoints of a training: whole or absent, and checked against their own hashes.

A checkpoint is two files, `NAME-STEP.safetensors` and `NAME-STEP.json`; the JSON comes last, holds
the tensors' SHA-256 and its own, and so closes the checkpoint.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
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


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: `prefix.INDEX.KEY` by the parameter's index."""
    return {
        f"{prefix}.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Undo `optimizer_tensors`; the optimiser's settings stay as they are.

    Files hold tensors contiguously; a moment gets its parameter's memory format back, because
    fused optimisers walk parameter, gradient and moments side by side in memory.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name[len(prefix) + 1 :].split(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a training: step, named tensors and plain values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; of that name, only it and the KEPT - 1 before it stay.

    Whatever else has the name goes too: later steps, which were passed over as broken, and what
    a crash left half written.
    """
    stem = f"{name}-{checkpoint.step:08d}"
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


def latest_checkpoint(folder: Path, name: str) -> Checkpoint | None:
    """The newest whole checkpoint; a truncated or altered one is passed over with a warning."""
    for closing in sorted(folder.glob(f"{name}-*.json"), reverse=True):
        try:
            content = read_json(closing)
            if content.pop("seal", None) != seal(content):
                raise CheckpointError(f"{closing} is not the file that was written")
            tensors = read_tensors(closing.with_suffix(".safetensors"), content["sha256"])
            return Checkpoint(content["step"], tensors, content["values"])
        except (CheckpointError, KeyError, TypeError) as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    return None


def drop_checkpoints(folder: Path, name: str) -> None:
    """Remove a finished training's checkpoints, and the folder once it is empty."""
    for file in _files_of(folder, name):
        file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
