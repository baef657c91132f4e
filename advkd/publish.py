"""Folders of networks as others take them: with a model card, and for a student with a pipeline
that diffusers runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from advkd.card import CARD, Facts, write_card
from advkd.files import CheckpointError, write_bytes, write_json
from advkd.hub import upload
from advkd.models.folders import Folders
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher, resolve, save_student, save_teacher

PIPELINE = "pipeline.py"  # by which diffusers finds it
_PIPELINE_SOURCE = Path(__file__).parent / "diffusers_pipeline.py"


def publish_student(
    student: Student, folder: Path, dtype: torch.dtype = torch.float32, facts: Facts | None = None
) -> None:
    """Write a student's folder: weights and config, the pipeline for diffusers, and a model card.

    Without `facts` the card says what the network itself tells, and one that is there stays.
    """
    save_student(student, folder, dtype)
    write_bytes(folder / PIPELINE, _PIPELINE_SOURCE.read_bytes())
    write_json(
        folder / "model_index.json", {"_class_name": [Path(PIPELINE).stem, "StudentPipeline"]}
    )
    _describe(student, folder, facts)


def publish_teacher(
    unet: UNet, folder: Path, dtype: torch.dtype = torch.float32, facts: Facts | None = None
) -> None:
    """Write a teacher's folder, a pipeline of diffusers, and a model card as `publish_student`."""
    save_teacher(unet, folder, dtype)
    _describe(unet, folder, facts)


def _describe(network: Student | UNet, folder: Path, facts: Facts | None) -> None:
    if facts is not None or not (folder / CARD).is_file():
        write_card(folder, network, facts or Facts(folder.resolve().name))


def push_folder(folder: str | Path, repository: str, **settings: Any) -> str:
    """Upload a folder of a network as it stands, such as runs/NAME/student with the model card of
    its figures, to a repository of the hub, OWNER/NAME, which is made if there is none.

    `settings` (private, token, revision, message, create_pr) are those of `Student.push_to_hub`.
    Returns the commit's address. CheckpointError for a folder without a network, where
    huggingface_hub is not installed, or for what the hub refuses.
    """
    place = resolve(folder)
    if not any((place / name).is_file() for name in ("config.json", "model_index.json")):
        raise CheckpointError(f"{folder} holds no network: it has no config.json")
    return upload(place, repository, **settings)


Student.folders = Folders(load_student, publish_student, upload)
UNet.folders = Folders(load_teacher, publish_teacher, upload)
