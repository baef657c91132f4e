"""Folders that hold a network: teachers in diffusers' layout, students in our own."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from pathlib import Path
from typing import Any

import torch

from advkd.config import ConfigError, StudentConfig, build
from advkd.diffusion import Schedule
from advkd.files import (
    CheckpointError,
    load_strictly,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from advkd.models.student import Student
from advkd.models.unet import UNet, config_from_diffusers, config_to_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"

# Attention names of uploads older than diffusers 0.15, and what they are called since.
DEPRECATED_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def zoo(name: str) -> Path:
    """The folder of a network that ships with the package; CheckpointError if there is none."""
    folder = Path(str(importlib.resources.files("advkd") / "zoo"))
    known = sorted(entry.name for entry in folder.glob("*") if entry.is_dir())
    if name not in known:
        raise CheckpointError(f"the zoo has no {name!r}; it has {', '.join(known)}")
    return folder / name


def resolve(source: str | Path) -> Path:
    """A folder by path, or `zoo:NAME`; CheckpointError if it does not exist."""
    text = str(source)
    if text.startswith("zoo:"):
        return zoo(text[4:])
    if not Path(source).is_dir():
        raise CheckpointError(f"there is no folder {text}")
    return Path(source)


def save_teacher(unet: UNet, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers pipeline folder: unet/, scheduler/ and, last, model_index.json."""
    tensors = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    write_tensors(folder / "unet" / WEIGHTS, tensors)
    write_json(folder / "unet" / "config.json", config_to_diffusers(unet.config))
    write_json(folder / "scheduler" / "scheduler_config.json", unet.schedule.to_diffusers())
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDIMPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )


def load_teacher(source: str | Path, scheduler: str | Path | None = None) -> UNet:
    """Load a DDPM UNet as diffusers or advkd saved it, in float32, ready to sample.

    `source` is a pipeline folder, a flat folder as the google/ddpm-* uploads are, a bare `unet/`
    folder (then `scheduler` names the folder or file of its scheduler_config.json), or `zoo:NAME`.
    Only safetensors are read. Raises CheckpointError for a file that is absent, broken or does
    not fit, ValueError for an architecture or scheduler setting that is not supported.
    """
    folder = resolve(source)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    schedule = Schedule.from_diffusers(read_json(_scheduler_file(folder, scheduler)))
    unet = UNet(config_from_diffusers(read_json(unet_folder / "config.json")), schedule)
    tensors = read_tensors(_weights_file(unet_folder))
    names = [_modern(name) for name in tensors]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(f"{unet_folder} holds twice, by old and new name: {', '.join(twice)}")
    load_strictly(unet, dict(zip(names, tensors.values(), strict=True)), unet_folder)
    return unet.eval().requires_grad_(False)


def _modern(name: str) -> str:
    """Map a deprecated attention tensor name to today's; others stay."""
    match = re.fullmatch(r"(.*attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in DEPRECATED_ATTENTION:
        return f"{match[1]}.{DEPRECATED_ATTENTION[match[2]]}.{match[3]}"
    return name


def _weights_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only a pickle ({pickles[0].name}), which advkd never reads: convert "
            "it with diffusers, UNet2DModel.from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS}")


def _scheduler_file(folder: Path, scheduler: str | Path | None) -> Path:
    if scheduler is not None:
        given = Path(scheduler)
        return given / "scheduler_config.json" if given.is_dir() else given
    for candidate in (folder / "scheduler", folder):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    raise CheckpointError(
        f"{folder} has no scheduler_config.json; name its folder with scheduler=… (or --scheduler)"
    )


def save_student(student: Student, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model.safetensors and, last, config.json."""
    tensors = {name: tensor.to(dtype) for name, tensor in student.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(
        folder / "config.json",
        {
            "size": student.size,
            "channels": student.channels,
            "target": student.target,
            "num_classes": student.num_classes,
            "student": dataclasses.asdict(student.config),
        },
    )


def load_student(source: str | Path) -> Student:
    """Load a student that `save_student` wrote, in float32, from a folder or `zoo:NAME`.

    Raises CheckpointError for a file that is absent, broken or does not fit.
    """
    folder = resolve(source)
    settings = read_json(folder / "config.json")
    try:
        config = build(StudentConfig, settings.pop("student"), "student.")
        student = Student(config, **settings)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json describes no student: {error}") from None
    load_strictly(student, read_tensors(folder / "model.safetensors"), folder)
    return student.eval().requires_grad_(False)


def network_card(folder: Path) -> dict[str, Any]:
    """What a shipped network says of itself (`card.json`), or nothing."""
    card = folder / "card.json"
    return dict(read_json(card)) if card.is_file() else {}
