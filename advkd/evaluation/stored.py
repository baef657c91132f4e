"""Evaluations of a teacher that are stored, so that its images need not be sampled again.

What is stored are the features of the images (float32, as the network gave them) and the SWD, under
the protocol they were made by; FD and the rest are computed from the features whenever they are
read. Only two makers are trusted: this package, whose evaluations are known by their SHA-256, and
a run, which reads what lies in its own folder. A file beside a teacher that somebody gives is
never read.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.evaluation.features import FEATURES, Features
from advkd.files import (
    CheckpointError,
    read_json,
    read_tensors,
    seal,
    write_json,
    write_tensors,
)

ZOO = Path(__file__).parents[1] / "zoo"
# SHA-256 of every evaluation.json that ships; the file holds that of the features beside it.
SHIPPED = {"fashion-mnist": "b8f4bc21a71e97fcfb7b16b5dde030b43f7ae0da90c7261d57fca6b957d04300"}


@dataclass(frozen=True)
class StoredEvaluation:
    """Features of a teacher's images, and their SWD (None where there is none)."""

    features: Features
    swd: float | None


def save_evaluation(folder: Path, protocol: Mapping[str, Any], stored: StoredEvaluation) -> None:
    """Write `evaluation.safetensors` and then `evaluation.json`, sealed, into `folder`."""
    tensors = {"values": torch.from_numpy(stored.features.values).float()}
    if stored.features.classes is not None:
        tensors["classes"] = torch.from_numpy(stored.features.classes).to(torch.int32)
    content = {
        "protocol": dict(protocol),
        "swd": stored.swd,
        "num_classes": stored.features.num_classes,
        "sha256": write_tensors(folder / "evaluation.safetensors", tensors),
    }
    write_json(folder / "evaluation.json", {**content, "seal": seal(content)})


def shipped_evaluation(protocol: Mapping[str, Any]) -> StoredEvaluation | None:
    """The evaluation by this very protocol that ships with the package; None where none does."""
    for name, sha256 in SHIPPED.items():
        path = ZOO / name / "evaluation.json"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            found = load_evaluation(path.parent, protocol)
            if found is not None:
                return found
    return None


def load_evaluation(folder: Path, protocol: Mapping[str, Any]) -> StoredEvaluation | None:
    """The evaluation in `folder`; None where there is none, or one by another protocol.

    A damaged or altered one is passed over with a warning.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content.pop("seal", None) != seal(content):
            raise CheckpointError(f"{path} is not the file that was written (its seal differs)")
        if content.get("protocol") != dict(protocol):
            return None
        return _read(folder / "evaluation.safetensors", content)
    except CheckpointError as error:
        warnings.warn(f"stored evaluation passed over: {error}", stacklevel=2)
        return None


def _read(path: Path, content: Mapping[str, Any]) -> StoredEvaluation:
    """Features and SWD; CheckpointError where the two files do not hold what they have to."""
    tensors = read_tensors(path, str(content.get("sha256")))
    values, classes = tensors.get("values"), tensors.get("classes")
    num, num_classes = content["protocol"].get("num"), content.get("num_classes")
    if num_classes is not None and type(num_classes) is not int:
        raise CheckpointError(f"{path.with_suffix('.json')}: num_classes={num_classes!r} is no int")
    if values is None or values.shape != (num, FEATURES) or values.dtype != torch.float32:
        raise CheckpointError(f"{path} does not hold the features of {num} images")
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{path} holds features that are not finite")
    if (classes is None) != (num_classes is None):
        raise CheckpointError(f"{path} does not hold what {num_classes=} says")
    labels = None
    if classes is not None and num_classes is not None:
        labels = classes.numpy().astype(np.int64)
        if labels.shape != (num,) or not ((labels >= 0) & (labels < num_classes)).all():
            raise CheckpointError(f"{path} does not hold one of {num_classes} classes an image")
    swd = content.get("swd")
    if swd is not None and not (isinstance(swd, float) and math.isfinite(swd)):
        raise CheckpointError(f"{path.with_suffix('.json')}: swd={swd!r} is no number")
    return StoredEvaluation(Features(values.double().numpy(), labels, num_classes), swd)
