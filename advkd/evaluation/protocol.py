"""Teacher and student evaluated by one protocol, side by side with real images.

What evaluates (the features, the held-out images, the noise) is never seen in training.
`docs/protocol.md` says what the figures mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.config import MIN_EVALUATED, ConfigError
from advkd.console import StopSignals, progress_bar
from advkd.data.images import ImageSet
from advkd.data.pixels import identity
from advkd.engine.noise import Purpose
from advkd.engine.sampling import Callback, generate
from advkd.evaluation import figures
from advkd.evaluation.features import FeatureNet
from advkd.evaluation.figures import FIGURES, Evaluation, Measures, evaluation_of, measure
from advkd.evaluation.stored import load_evaluation, save_evaluation, shipped_evaluation
from advkd.files import tensors_hash
from advkd.models.student import Student
from advkd.models.unet import UNet

EVALUATION_SEED = 0  # of the images that are evaluated; their noise has a purpose of its own
REFERENCE_SEED = 1  # of the teacher's samples that stand in for real images
TEACHER_BATCH, STUDENT_BATCH = 125, 250  # images sampled at once
MAX_REFERENCE = 2000  # of the teacher's samples that stand in for real images


@dataclass(frozen=True)
class Protocol:
    """What makes two sets of figures comparable; also the key of a stored evaluation."""

    num: int  # images sampled from each network
    blocks: int  # that they are split into, each with figures of its own
    teacher_steps: int  # of DDIM, eta 0
    seed: int
    teacher: str  # hash of its weights; empty where a student is evaluated alone
    features: str  # hash of the network they are computed by
    reference: str  # hash of the reference images
    figures: int = figures.VERSION  # of their definitions

    @property
    def block(self) -> int:
        """Images of a block."""
        return self.num // self.blocks


@dataclass(frozen=True)
class Reference:
    """The images that all others are compared with.

    identity: their hash, or which of the teacher's they are. words: what they are. train: the
    training images, whose figures are those of *real*; None where there are no real images.
    """

    measures: Measures
    identity: str
    words: str
    train: ImageSet | None = None


def check_blocks(num: int, blocks: int) -> None:
    """ConfigError unless `num` images can be split into so many blocks."""
    if not 1 <= blocks <= num // MIN_EVALUATED:
        raise ConfigError(
            f"{num:,} images cannot be split into {blocks} blocks of {MIN_EVALUATED} or more each"
        )


def make_protocol(
    net: FeatureNet,
    reference: Reference,
    teacher: UNet | None,
    num: int,
    blocks: int,
    teacher_steps: int,
) -> Protocol:
    """The protocol that `teacher` and its student are evaluated by; ConfigError for blocks that
    cannot be."""
    check_blocks(num, blocks)
    return Protocol(
        num=num // blocks * blocks,
        blocks=blocks,
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
    split = ""
    if protocol.blocks > 1:
        split = (
            f", in {protocol.blocks} blocks of {protocol.block:,}, of whose figures mean and "
            "standard deviation are given"
        )
    return (
        f"{protocol.num:,} images of each network{how}{split}, from noise that no training sees, "
        f"compared with {reference.words}. FD and KID on the 64 features of {features}, in "
        "float64; precision and recall by 5 nearest neighbors of the same features; texture FD on "
        "the mean and the deviation of every channel of that network's earlier layers; SWD on "
        "pixels over 512 projections, texture SWD on patches of a Laplacian pyramid over 128; the "
        "spectrum's distance over all radial frequencies. Nothing that evaluates takes part in "
        "training."
    )


def images_reference(net: FeatureNet, train: ImageSet, held_out: ImageSet) -> Reference:
    """Held-out images as the reference, beside training images to compare with them."""
    words = f"{len(held_out):,} held-out images of {held_out.source}"
    return Reference(measure(net, held_out), images_hash(held_out), words, train)


def teacher_reference(
    net: FeatureNet, teacher: UNet, num: int, steps: int, callback: Callback | None = None
) -> Reference:
    """The reference where there are no real images: other samples of the teacher."""
    num = min(num, MAX_REFERENCE)
    images = _sampled(teacher, 0, num, REFERENCE_SEED, steps, callback)
    words = f"{num:,} other samples of the teacher"
    return Reference(measure(net, images), f"{num} of the teacher", words)


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
    """The figures of real images, teacher and student, by figure and then by side: each a number,
    or {"mean", "std"} over several blocks; and `spectra`, in dB, by side.

    A side that is None, or that the reference has no images for, is left out. `own`, `fresh` and
    `callback` as in `evaluate_teacher`.
    """
    sides: dict[str, Evaluation] = {}
    if reference.train is not None:
        sides["real"] = evaluate_real(net, reference, protocol)
    if teacher is not None:
        sides["teacher"] = evaluate_teacher(
            net, teacher, reference, protocol, own=own, fresh=fresh, callback=callback
        )
    if student is not None:
        sides["student"] = evaluate_network(net, student, reference, protocol, callback)
    found = {key: {side: e.figure(key) for side, e in sides.items()} for key in FIGURES}
    return found | {"spectra": {side: e.spectrum for side, e in sides.items()}}


def evaluate_real(net: FeatureNet, reference: Reference, protocol: Protocol) -> Evaluation:
    """Figures of training images, in as many blocks as there are images for, but at least one.

    The images of a block are picked in an order that is random but fixed.
    """
    train = reference.train
    if train is None:
        raise ValueError("this reference has no training images")
    order = np.random.default_rng(0).permutation(len(train))
    size = min(protocol.block, len(train))
    count = min(protocol.blocks, len(train) // size)
    parts = (order[i * size : (i + 1) * size] for i in range(count))
    return evaluation_of(reference.measures, (measure(net, train.subset(p)) for p in parts))


def evaluate_network(
    net: FeatureNet,
    network: Student | UNet,
    reference: Reference,
    protocol: Protocol,
    callback: Callback | None = None,
) -> Evaluation:
    """Figures of a network's images, sampled now; `callback` as in `generate`."""
    steps = protocol.teacher_steps if isinstance(network, UNet) else 1
    block, blocks = protocol.block, protocol.blocks

    def measured(index: int) -> Measures:
        def report(done: int, total: int) -> None:
            if callback is not None:
                callback(index * total + done, blocks * total)

        images = _sampled(network, index * block, block, protocol.seed, steps, report)
        return measure(net, images)

    return evaluation_of(reference.measures, map(measured, range(blocks)))


def evaluate_teacher(
    net: FeatureNet,
    teacher: UNet,
    reference: Reference,
    protocol: Protocol,
    *,
    own: Path | None = None,
    fresh: bool = False,
    callback: Callback | None = None,
) -> Evaluation:
    """Figures of a teacher's images: an evaluation stored under this very protocol, else of images
    sampled now.

    `own` is the folder where the run at hand stores its evaluation; what is sampled is stored
    there. `fresh` samples in any case. `callback` as in `generate`.
    """
    key = asdict(protocol)
    found = None if fresh else _stored(key, own)
    if found is None:
        found = evaluate_network(net, teacher, reference, protocol, callback)
        if own is not None:
            save_evaluation(own, key, found)
    elif callback is not None:
        callback(1, 1)
    return found


def _stored(key: dict[str, Any], own: Path | None) -> Evaluation | None:
    """The evaluation that ships with the package or lies in the run's own folder."""
    found = shipped_evaluation(key)
    if found is None and own is not None:
        found = load_evaluation(own, key)
    return found


def _sampled(
    model: UNet | Student, first: int, num: int, seed: int, steps: int, callback: Callback | None
) -> torch.Tensor:
    """Images of a network from the noise of evaluations, as `generate` gives them."""
    batch: int | None = TEACHER_BATCH if isinstance(model, UNet) else STUDENT_BATCH
    if next(model.parameters()).is_cuda:
        batch = None  # as many as fill the device
    return generate(
        model,
        num,
        seed,
        steps,
        first=first,
        batch=batch,
        purpose=Purpose.EVALUATION,
        callback=callback,
    )


@contextlib.contextmanager
def sampling_bar(samplings: int) -> Iterator[Callback]:
    """A progress bar over so many samplings of a network; Ctrl-C ends one at its next pass."""
    with StopSignals() as stop, progress_bar("evaluate", 100, unit="%") as bar:
        finished, latest = 0, 0.0  # samplings, and how far the one at work is

        def report(done: int, total: int) -> None:
            nonlocal finished, latest
            if stop.requested:
                raise KeyboardInterrupt
            finished += done / total < latest
            latest = done / total
            bar.update(int(100 * (finished + latest) / samplings) - bar.n)

        yield report
        if stop.requested:
            raise KeyboardInterrupt


def images_hash(images: ImageSet) -> str:
    """The identity of a set of images: SHA-256 over shape, dtype and pixels."""
    return identity(images.pixels)
