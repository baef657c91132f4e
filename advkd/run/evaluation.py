"""Evaluating a run: its features, and the figures of its teacher and student."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from advkd.data import Dataset, ImageSet
from advkd.data.trajectories import Trajectories
from advkd.device import placed
from advkd.evaluation.features import (
    FeatureNet,
    FitSettings,
    fit_features,
    load_features,
    save_features,
)
from advkd.evaluation.protocol import (
    evaluate_networks,
    images_reference,
    make_protocol,
    protocol_words,
    sampling_bar,
    teacher_reference,
)
from advkd.evaluation.timing import count_parameters, measure_milliseconds
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import resolve
from advkd.run.run import Run

FEATURE_STEPS = 400  # of features that are fitted within a run


def features_of_dataset(dataset: Dataset | None, size: int, channels: int) -> FeatureNet | None:
    """The feature network that comes with a data set, where it takes images of this shape."""
    if dataset is None or not dataset.features_source:
        return None
    net = load_features(resolve(dataset.features_source))
    return net if (net.size, net.channels) == (size, channels) else None


def features_of(run: Run) -> FeatureNet:
    """The feature network: configured, the data set's where it fits, else fitted in the run."""
    config, images = run.config, run.images()
    if config.evaluate.features:
        return load_features(resolve(config.evaluate.features))
    own = run.path / "features"
    if (own / "config.json").is_file():
        return load_features(own)
    net = features_of_dataset(run.dataset, config.data.size, config.data.channels)
    if net is not None:
        return net
    train = _sampled_images(run) if images is None else images.train
    settings = FitSettings(steps=FEATURE_STEPS, flip=config.data.flip)
    save_features(fit_features(train, settings=settings, device=run.device), own)
    return load_features(own)


def _sampled_images(run: Run) -> ImageSet:
    """What stands in for training images where there are none: what the trajectories end in."""
    count = min(2000, run.config.trajectory.num)
    store = Trajectories(run.path / "trajectories", count)
    parts = torch.arange(count).split(50)
    ends = [store.targets(part, -1).float().clamp(-1, 1) for part in parts]
    return ImageSet(torch.cat(ends).numpy(), None, "samples of the teacher")


class RunFigures(NamedTuple):
    """Figures by name and side; the protocol and the features in words; names of the classes."""

    figures: dict[str, dict[str, Any]]
    protocol: str
    features: str
    class_names: tuple[str, ...] | None


def figures_of_run(run: Run, fresh: bool = False) -> RunFigures:
    """The figures of real images, teacher and student.

    A stored evaluation of the teacher is used where it fits, unless `fresh`; what is sampled anew
    is stored in the run's folder.
    """
    settings, images = run.config.evaluate, run.images()
    teacher, student, net = run.teacher(), run.student(), placed(features_of(run), run.device)
    num, steps, own = settings.num, settings.teacher_steps, run.path / "evaluation"
    with sampling_bar(3 if images is None else 2) as report:
        if images is None:
            reference = teacher_reference(net, teacher, num, steps, report)
        else:
            reference = images_reference(net, images.train, images.held_out)
        protocol = make_protocol(net, reference, teacher, num, settings.blocks, steps)
        figures = evaluate_networks(
            net, reference, protocol, teacher, student, own=own, fresh=fresh, callback=report
        )
    features = _features_words(run, net)
    words = protocol_words(protocol, reference, features)
    return RunFigures(figures, words, features, net.class_names)


def _features_words(run: Run, net: FeatureNet) -> str:
    kind = net.kind
    if run.config.evaluate.features:
        return f"{kind} ({run.config.evaluate.features})"
    dataset = run.dataset
    if dataset is not None and not (run.path / "features" / "config.json").is_file():
        return f"{kind} that comes with {dataset.title or dataset.name}"
    return f"{kind} fitted on the {'training images' if run.has_images else 'trajectories'}"


def costs(teacher: UNet, student: Student, steps: int) -> dict[str, Any]:
    """Network passes, parameters and milliseconds per image of both, and the speed-up."""
    milliseconds = measure_milliseconds(teacher, student, steps)
    return {
        "passes": {"teacher": steps, "student": 1},
        "parameters": {
            "teacher": count_parameters(teacher),
            "student": count_parameters(student),
        },
        "ms_per_image": milliseconds,
        "speed_up": milliseconds["teacher"] / milliseconds["student"],
    }
