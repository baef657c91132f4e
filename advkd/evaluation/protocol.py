"""Judging a teacher and its student by one protocol, side by side with real images.

What judges (the features, the held-out images, the seeds from EVALUATION_SEED on) is never seen in
training. `docs/protocol.md` says what the figures mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advkd.console import StopSignals, progress_bar
from advkd.data.images import ImageSet
from advkd.engine.noise import Purpose
from advkd.engine.sampling import Callback, generate
from advkd.evaluation.metrics import (
    FeatureNet,
    Features,
    Judged,
    extract,
    judge,
    sliced_wasserstein,
)
from advkd.files import (
    CheckpointError,
    read_json,
    read_tensors,
    tensors_hash,
    write_json,
    write_tensors,
)
from advkd.models.student import Student
from advkd.models.unet import UNet

EVALUATION_SEED = 0
REFERENCE_SEED = 1  # of the teacher's samples where they stand in for real images
TIMED_IMAGES = 64
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Protocol:
    """What makes two sets of figures comparable; also the key of a teacher's stored judgement."""

    num: int  # images drawn from each network
    teacher_steps: int  # of DDIM, eta 0
    seed: int
    teacher: str  # hash of its weights; empty where a student is judged alone
    features: str  # hash of the network that judges
    reference: str  # hash of the images judged against


@dataclass(frozen=True)
class Reference:
    """What networks are judged against.

    judged: the images and their features. identity: their hash. words: what they are.
    real: figures of training images against them, None where there are no real images.
    """

    judged: Judged
    identity: str
    words: str
    real: dict[str, Any] | None


def protocol_words(protocol: Protocol, reference: Reference, features: str) -> str:
    """The protocol in words, for reports; `features` says what judges."""
    how = ""
    if protocol.teacher:
        how = f" (the teacher by DDIM in {protocol.teacher_steps} steps, eta 0)"
    return (
        f"{protocol.num:,} images of each network, drawn from a seed that training refuses{how}, "
        f"against {reference.words}. FD and "
        f"KID on the 64 features of {features}, in float64; precision and recall by 5 nearest "
        "neighbours of the same features; SWD on pixels over 512 projections. Nothing that "
        "judges takes part in training."
    )


def images_hash(images: ImageSet) -> str:
    """The identity of a set of images."""
    digest = hashlib.sha256(f"{images.pixels.shape} {images.pixels.dtype}".encode())
    digest.update(images.pixels.tobytes())
    return digest.hexdigest()


def make_protocol(
    net: FeatureNet, reference: Reference, teacher: UNet | None, num: int, teacher_steps: int
) -> Protocol:
    """The protocol under which `teacher` and its student are judged."""
    return Protocol(
        num=num,
        teacher_steps=teacher_steps,
        seed=EVALUATION_SEED,
        teacher="" if teacher is None else tensors_hash(teacher.state_dict()),
        features=tensors_hash(net.state_dict()),
        reference=reference.identity,
    )


@contextlib.contextmanager
def drawing(samplings: int) -> Iterator[Callback]:
    """A progress bar over so many samplings of a teacher; Ctrl-C ends one at its next pass."""
    with StopSignals() as stop, progress_bar("evaluate", 100 * samplings, unit="%") as bar:

        def report(done: int, passes: int) -> None:
            if stop.requested:
                raise KeyboardInterrupt
            bar.update(100 * done // passes - bar.n % 100)

        yield report
        if stop.requested:
            raise KeyboardInterrupt


def evaluate_real(net: FeatureNet, images: ImageSet, reference: Judged) -> dict[str, Any]:
    """Figures of real training images against the reference: what a perfect network would get."""
    count = min(len(images), len(reference.features.values))
    some = ImageSet(images.pixels[:count], None, images.source)
    return judge(reference, Judged(extract(net, some), some))


def evaluate_student(
    net: FeatureNet, student: Student, reference: Judged, protocol: Protocol
) -> dict[str, Any]:
    """Figures of a student's images, drawn anew."""
    images = generate(student, protocol.num, protocol.seed, purpose=Purpose.EVALUATION, batch=250)
    return judge(reference, Judged(extract(net, images), images))


def evaluate_teacher(
    net: FeatureNet,
    teacher: UNet,
    reference: Judged,
    protocol: Protocol,
    stored: tuple[Path, ...] = (),
    keep: Path | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Figures of a teacher's images: from a stored judgement of this very protocol, else drawn.

    `stored` are folders that may hold one; what is drawn is stored in `keep`.
    """
    for folder in stored:
        found = _load_judged(folder, protocol)
        if found is not None:
            features, swd = found
            return {**judge(reference, Judged(features, None)), "swd": swd}
    images = generate(
        teacher, protocol.num, protocol.seed, protocol.teacher_steps, callback=callback, batch=125,
        purpose=Purpose.EVALUATION,
    )
    features = extract(net, images)
    swd = None if reference.images is None else sliced_wasserstein(reference.images, images)
    if keep is not None:
        _save_judged(keep, protocol, features, swd)
    return {**judge(reference, Judged(features, None)), "swd": swd}


def _save_judged(folder: Path, protocol: Protocol, features: Features, swd: float | None) -> None:
    tensors = {"values": torch.from_numpy(features.values).float()}
    if features.classes is not None:
        tensors["classes"] = torch.from_numpy(features.classes).to(torch.int16)
    sha256 = write_tensors(folder / "judged.safetensors", tensors)
    closing = {
        "protocol": asdict(protocol),
        "swd": swd,
        "num_classes": features.num_classes,
        "sha256": sha256,
    }
    write_json(folder / "judged.json", closing)


def _load_judged(folder: Path, protocol: Protocol) -> tuple[Features, float | None] | None:
    try:
        closing = read_json(folder / "judged.json")
        if closing["protocol"] != asdict(protocol):
            return None
        tensors = read_tensors(folder / "judged.safetensors", closing["sha256"])
    except (CheckpointError, KeyError, TypeError):
        return None
    classes = tensors.get("classes")
    features = Features(
        tensors["values"].double().numpy(),
        None if classes is None else classes.numpy().astype(np.int64),
        closing["num_classes"],
    )
    return features, closing["swd"]


def measure_milliseconds(
    teacher: UNet, student: Student, teacher_steps: int, images: int = TIMED_IMAGES
) -> dict[str, float]:
    """Milliseconds per image of both, wall time, in batches of the same size in one run.

    The two take turns, and the median of the rounds counts: a neighbour's noise falls on both.
    """

    def seconds(model: nn.Module, steps: int) -> float:
        assert isinstance(model, UNet | Student)
        began = time.perf_counter()
        batch = -(-images // torch.get_num_threads())
        generate(model, images, 0, steps, purpose=Purpose.EVALUATION, batch=batch)
        return time.perf_counter() - began

    seconds(student, 1)  # the first call also allocates and picks algorithms
    seconds(teacher, 1)
    rounds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(TIMED_ROUNDS):
        rounds["student"].append(statistics.median(seconds(student, 1) for _ in range(9)))
        rounds["teacher"].append(seconds(teacher, teacher_steps))
    return {name: statistics.median(times) / images * 1e3 for name, times in rounds.items()}


def parameters(model: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(p.numel() for p in model.parameters())


def images_reference(net: FeatureNet, train: ImageSet, held_out: ImageSet) -> Reference:
    """Held-out images as the reference, and how training images fare against them."""
    judged = Judged(extract(net, held_out), held_out)
    words = f"{len(held_out):,} held-out images of {held_out.source}"
    return Reference(judged, images_hash(held_out), words, evaluate_real(net, train, judged))


def teacher_reference(
    net: FeatureNet, teacher: UNet, num: int, steps: int, callback: Callback | None = None
) -> Reference:
    """The reference where there are no real images: other samples of the teacher."""
    images = generate(
        teacher, num, REFERENCE_SEED, steps, purpose=Purpose.EVALUATION, batch=125,
        callback=callback,
    )  # fmt: skip
    judged = Judged(extract(net, images), images)
    return Reference(judged, "teacher", "as many other samples of the teacher", None)


def side_by_side(sides: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Figures by side (real, teacher, student; None is left out) as sides by figure."""
    present = {name: figures for name, figures in sides.items() if figures is not None}
    return {
        key: {name: figures[key] for name, figures in present.items()}
        for key in ("fd", "kid", "precision", "recall", "swd", "classes")
    }


def features_kind(net: FeatureNet) -> str:
    """What sort of network judges."""
    return "a small autoencoder" if net.num_classes is None else "a small classifier"
