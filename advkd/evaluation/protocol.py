"""Teacher and student evaluated by one protocol, side by side with real images.

What evaluates (the features, the held-out images, the noise) is never seen in training.
`docs/protocol.md` says what the figures mean.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.console import StopSignals, progress_bar
from advkd.data.images import ImageSet
from advkd.engine.noise import Purpose
from advkd.engine.sampling import Callback, generate
from advkd.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)
from advkd.evaluation.features import FeatureNet, Features, class_shares, extract, rows_of
from advkd.evaluation.stored import (
    StoredEvaluation,
    load_evaluation,
    save_evaluation,
    shipped_evaluation,
)
from advkd.files import tensors_hash
from advkd.models.student import Student
from advkd.models.unet import UNet

EVALUATION_SEED = 0  # of the images that are evaluated; their noise has a purpose of its own
REFERENCE_SEED = 1  # of the teacher's samples that stand in for real images
TEACHER_BATCH, STUDENT_BATCH = 125, 250  # images sampled at once
FIGURES = ("fd", "kid", "precision", "recall", "swd", "classes")

Images = ImageSet | torch.Tensor  # or float32 (N, C, H, W) in [-1, 1]


@dataclass(frozen=True)
class Protocol:
    """What makes two sets of figures comparable; also the key of a stored evaluation."""

    num: int  # images sampled from each network
    teacher_steps: int  # of DDIM, eta 0
    seed: int
    teacher: str  # hash of its weights; empty where a student is evaluated alone
    features: str  # hash of the network they are computed by
    reference: str  # hash of the reference images


@dataclass(frozen=True)
class Reference:
    """The images that all others are compared with.

    identity: their hash. words: what they are. real: figures of training images compared with
    them, None where there are no real images.
    """

    images: Images
    features: Features
    identity: str
    words: str
    real: dict[str, Any] | None = None


def make_protocol(
    net: FeatureNet, reference: Reference, teacher: UNet | None, num: int, teacher_steps: int
) -> Protocol:
    """The protocol that `teacher` and its student are evaluated by."""
    return Protocol(
        num=num,
        teacher_steps=teacher_steps,
        seed=EVALUATION_SEED,
        teacher="" if teacher is None else tensors_hash(teacher.state_dict()),
        features=tensors_hash(net.state_dict()),
        reference=reference.identity,
    )


def protocol_words(protocol: Protocol, reference: Reference, features: str) -> str:
    """The protocol in words, for reports; `features` says which network computes them."""
    how = ""
    if protocol.teacher:
        how = f" (the teacher by DDIM in {protocol.teacher_steps} steps, eta 0)"
    return (
        f"{protocol.num:,} images of each network{how}, from noise that no training sees, compared "
        f"with {reference.words}. FD and KID on the 64 features of {features}, in float64; "
        "precision and recall by 5 nearest neighbors of the same features; SWD on pixels over 512 "
        "projections. Nothing that evaluates takes part in training."
    )


def images_reference(net: FeatureNet, train: ImageSet, held_out: ImageSet) -> Reference:
    """Held-out images as the reference, with the figures of equally many training images."""
    features, identity = extract(net, held_out), images_hash(held_out)
    words = f"{len(held_out):,} held-out images of {held_out.source}"
    reference = Reference(held_out, features, identity, words)
    real = evaluate_images(net, _first(train, len(held_out)), reference)
    return Reference(held_out, features, identity, words, real)


def teacher_reference(
    net: FeatureNet, teacher: UNet, num: int, steps: int, callback: Callback | None = None
) -> Reference:
    """The reference where there are no real images: other samples of the teacher."""
    images = sample_images(
        teacher, num, REFERENCE_SEED, steps, batch=TEACHER_BATCH, callback=callback
    )
    words = "as many other samples of the teacher"
    return Reference(images, extract(net, images), "teacher", words)


def evaluate_networks(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet | None,
    student: Student | None,
    *,
    own: Path | None = None,
    fresh: bool = False,
    callback: Callback | None = None,
) -> dict[str, dict[str, Any]]:
    """The figures of real images, teacher and student, by figure and then by side.

    A side that is None, or that the reference has no images for, is left out. `own`, `fresh` and
    `callback` as in `evaluate_teacher`.
    """
    sides = {"real": reference.real}
    if teacher is not None:
        sides["teacher"] = evaluate_teacher(
            net, teacher, reference, protocol, own=own, fresh=fresh, callback=callback
        )
    if student is not None:
        sides["student"] = evaluate_student(net, student, reference, protocol, callback)
    present = {side: figures for side, figures in sides.items() if figures is not None}
    return {key: {side: found[key] for side, found in present.items()} for key in FIGURES}


def evaluate_student(
    net: FeatureNet,
    student: Student,
    reference: Reference,
    protocol: Protocol,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Figures of a student's images, which are always sampled anew; `callback` as in `generate`."""
    images = sample_images(
        student, protocol.num, protocol.seed, batch=STUDENT_BATCH, callback=callback
    )
    return evaluate_images(net, images, reference)


def evaluate_teacher(
    net: FeatureNet,
    teacher: UNet,
    reference: Reference,
    protocol: Protocol,
    *,
    own: Path | None = None,
    fresh: bool = False,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Figures of a teacher's images: from an evaluation stored under this very protocol, else of
    images sampled now.

    `own` is the folder where the run at hand stores its evaluation; what is sampled is stored
    there. `fresh` samples in any case. `callback` as in `generate`.
    """
    key = asdict(protocol)
    stored = None if fresh else _stored(key, own)
    if stored is None:
        images = sample_images(
            teacher,
            protocol.num,
            protocol.seed,
            protocol.teacher_steps,
            batch=TEACHER_BATCH,
            callback=callback,
        )
        stored = StoredEvaluation(extract(net, images), _swd(reference.images, images))
        if own is not None:
            save_evaluation(own, key, stored)
    elif callback is not None:
        callback(1, 1)
    return _figures(reference, stored.features, stored.swd)


def _stored(key: dict[str, Any], own: Path | None) -> StoredEvaluation | None:
    """The evaluation that ships with the package or lies in the run's own folder."""
    found = shipped_evaluation(key)
    if found is None and own is not None:
        found = load_evaluation(own, key)
    return found


def evaluate_images(net: FeatureNet, images: Images, reference: Reference) -> dict[str, Any]:
    """All figures of images, ready for JSON.

    Keys: fd, kid, precision, recall, swd, classes (the shares, None from an autoencoder).
    """
    return _figures(reference, extract(net, images), _swd(reference.images, images))


def sample_images(
    model: UNet | Student,
    num: int,
    seed: int,
    steps: int = 1,
    *,
    batch: int,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Images of a network from the noise of evaluations, as `generate` gives them."""
    return generate(
        model, num, seed, steps, purpose=Purpose.EVALUATION, batch=batch, callback=callback
    )


@contextlib.contextmanager
def sampling_bar(samplings: int) -> Iterator[Callback]:
    """A progress bar over so many samplings of a network; Ctrl-C ends one at its next pass."""
    with StopSignals() as stop, progress_bar("evaluate", 100 * samplings, unit="%") as bar:

        def report(done: int, total: int) -> None:
            if stop.requested:
                raise KeyboardInterrupt
            bar.update(100 * done // total - bar.n % 100)

        yield report
        if stop.requested:
            raise KeyboardInterrupt


def images_hash(images: ImageSet) -> str:
    """The identity of a set of images: SHA-256 over shape, dtype and pixels."""
    digest = hashlib.sha256(f"{images.pixels.shape} {images.pixels.dtype}".encode())
    digest.update(images.pixels.tobytes())
    return digest.hexdigest()


def _figures(reference: Reference, features: Features, swd: float | None) -> dict[str, Any]:
    real, fake = reference.features.values, features.values
    precision, recall = precision_recall(real, fake)
    shares = class_shares(features)
    return {
        "fd": frechet_distance(real, fake),
        "kid": kernel_distance(real, fake),
        "precision": precision,
        "recall": recall,
        "swd": swd,
        "classes": None if shares is None else shares.tolist(),
    }


def _swd(a: Images, b: Images) -> float:
    return sliced_wasserstein(_flat(a), _flat(b))


def _flat(images: Images) -> np.ndarray:
    """Pixels as float64 (N, C*H*W)."""
    rows = rows_of(images, np.arange(len(images)))
    return rows.flatten(1).double().cpu().numpy()


def _first(images: ImageSet, count: int) -> ImageSet:
    return ImageSet(images.pixels[:count], None, images.source)
