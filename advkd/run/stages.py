"""The main job as stages over one folder: teacher, trajectories, distill, evaluate, report.

Each stage leaves a marker with its seconds, and `config.toml` what the folder was made from. A
stage whose marker stands is skipped, so running the same command again goes on where it stopped;
another configuration is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.config import (
    Config,
    ConfigError,
    as_tree,
    parse,
    to_toml,
)
from advkd.console import Interrupted, StopSignals, progress_bar
from advkd.data.images import (
    CLASS_NAMES,
    ImageSet,
    load_images,
    shipped,
)
from advkd.data.trajectories import (
    Trajectories,
    check_trajectories,
    index_of,
    sample_trajectories,
)
from advkd.engine.sampling import (
    EVALUATION_SEED,
    sample,
    sample_labels,
    sample_x_T,
    saved_steps,
    table_of,
)
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
from advkd.files import (
    CheckpointError,
    hold,
    read_json,
    write_bytes,
    write_json,
)
from advkd.models.discriminator import Discriminator
from advkd.models.layers import area_resized
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import (
    load_student,
    load_teacher,
    resolve,
    save_teacher,
)
from advkd.report.inputs import read_metrics, read_summary
from advkd.report.page import write_report
from advkd.report.pictures import Pictures
from advkd.training.checkpoint import drop_checkpoints
from advkd.training.distill import check_settings, distill_student
from advkd.training.teacher import train_teacher

STAGES = ("teacher", "trajectories", "distill", "evaluate", "report")

# The tables of the configuration that a stage's result depends on, beside the stages before it.
_DEPENDS = {
    "teacher": ("data", "unet", "schedule", "teacher"),
    "trajectories": ("trajectory",),
    "distill": ("student", "discriminator", "distill"),
    "evaluate": ("evaluate",),
    "report": (),
}
_HARMLESS = ("log_every", "checkpoint_every")  # keys that change no result
_FOLDERS = {
    "teacher": "teacher",
    "trajectories": "trajectories",
    "distill": "student",
    "evaluate": "report",
    "report": "report",
}
PICTURED = 48  # images of each side in the report's grids
PICTURED_PATHS = 8  # trajectories in the report
MIN_IMAGES = 30  # a fifth is held out, and 5 nearest neighbours need 6 images


@dataclass(frozen=True)
class RealImages:
    """The images of a run: to train on, and held out to judge by."""

    train: ImageSet
    held_out: ImageSet


def read_images(config: Config) -> RealImages:
    """The shipped Fashion-MNIST, or `data.path` with a part held out."""
    d = config.data
    if not d.path:
        if (d.size, d.channels) != (28, 1):
            raise ConfigError(
                f"the images that ship are 28x28 with 1 channel, not {d.size}x{d.size} with "
                f"{d.channels}: give --data"
            )
        return RealImages(shipped("train"), shipped("test"))
    return hold_out(load_images(d.path, size=d.size, channels=d.channels, crop=d.crop))


def hold_out(images: ImageSet) -> RealImages:
    """Keep every fifth image (at most 2,000), always the same ones, apart from the training."""
    if len(images) < MIN_IMAGES:
        raise ConfigError(
            f"{images.source} holds {len(images)} images; at least {MIN_IMAGES} are needed"
        )
    count = min(2000, len(images) // 5)
    order = np.random.default_rng(0).permutation(len(images))
    return RealImages(_part(images, order[count:]), _part(images, order[:count]))


def has_images(config: Config) -> bool:
    """Whether there are real images: the user's, or those that ship beside a teacher of ours."""
    source = config.teacher.source
    return bool(config.data.path) or not source or source.startswith("zoo:")


def _part(images: ImageSet, rows: np.ndarray) -> ImageSet:
    labels = None if images.labels is None else images.labels[rows]
    return ImageSet(images.pixels[rows], labels, images.source)


class Run:
    """One run: its configuration, its folder, and its stages in order."""

    def __init__(self, config: Config, folder: Path, has_images: bool = True):
        self.config, self.folder = config, folder
        self.has_images = has_images
        self._images: RealImages | None = None

    # What is on disk.

    def marker(self, stage: str) -> Path:
        """The file that closes a stage."""
        return self.folder / _FOLDERS[stage] / f"{stage}.done.json"

    def is_done(self, stage: str) -> bool:
        return self.marker(stage).is_file()

    def finish(self, stage: str, seconds: float) -> None:
        write_json(self.marker(stage), {"seconds": round(seconds, 3)})

    def seconds(self, stage: str) -> float | None:
        return read_json(self.marker(stage))["seconds"] if self.is_done(stage) else None

    @contextlib.contextmanager
    def opened(self, redo: str | None = None) -> Iterator[None]:
        """Create the folder, or check that what is in it was made by this configuration.

        `redo` names a stage whose result, and those of all later ones, are removed first.
        Raises ConfigError where a result stands that another configuration made, CheckpointError
        while another process is at work on the folder.
        """
        stored = self.folder / "config.toml"
        with hold(self.folder):
            first = len(STAGES) if redo is None else STAGES.index(redo)
            if first and stored.is_file():
                self._refuse_other(parse(stored.read_text(), where=str(stored)), STAGES[:first])
            for stage in reversed(STAGES[first:]):
                self._remove(stage)
            write_bytes(stored, to_toml(self.config).encode())
            yield

    def _refuse_other(self, stored: Config, stages: tuple[str, ...]) -> None:
        for i, stage in enumerate(stages):
            tables = ("run", *_DEPENDS[stage]) if i == 0 else _DEPENDS[stage]
            differing = _differing(stored, self.config, tables)
            begun = [later for later in stages[i:] if self._has_begun(later)]
            if differing and begun:
                raise ConfigError(
                    f"{self.folder} was made with another {', '.join(differing)}; choose another "
                    f"--name, or --redo {stage} to remove its {' and '.join(begun)}"
                )

    def _has_begun(self, stage: str) -> bool:
        checkpoints = any((self.folder / "checkpoints").glob(f"{stage}-*"))
        return self.is_done(stage) or checkpoints or (self.folder / _FOLDERS[stage]).exists()

    def _remove(self, stage: str) -> None:
        self.marker(stage).unlink(missing_ok=True)  # first: what is half removed is no result
        shutil.rmtree(self.folder / _FOLDERS[stage], ignore_errors=True)
        drop_checkpoints(self.folder / "checkpoints", stage)
        if stage in ("teacher", "trajectories"):  # what features may have been fitted on
            shutil.rmtree(self.folder / "features", ignore_errors=True)

    # What the stages share.

    def images(self) -> RealImages | None:
        """Real images, or None where a teacher is distilled without any."""
        if self._images is None and self.has_images:
            self._images = read_images(self.config)
        return self._images

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of what the shipped classifier tells apart, where it judges the shipped images."""
        own = self.config.data.path or self.config.evaluate.features
        return CLASS_NAMES if self.has_images and not own else None

    def teacher(self) -> UNet:
        return load_teacher(self.folder / "teacher")

    def student(self) -> Student:
        return load_student(self.folder / "student")

    # The stages.

    def check(self) -> None:
        """ConfigError or ValueError for what a stage would refuse after hours of earlier ones."""
        c = self.config
        check_trajectories(c.trajectory)
        check_settings(c.distill, len(c.student.stages))
        with torch.device("meta"):
            Student(c.student, c.data.size, c.data.channels)
            Discriminator(c.discriminator, c.data.size, c.data.channels, c.student.stages)

    def make(self, stage: str) -> None:
        """Carry out one stage unless its result stands."""
        if self.is_done(stage):
            return
        seconds = _MAKERS[stage](self)
        self.finish(stage, seconds)


def _differing(a: Config, b: Config, tables: tuple[str, ...]) -> list[str]:
    """Keys of these tables that differ in a way that changes results."""
    tree_a, tree_b = as_tree(a), as_tree(b)
    return [
        f"{table}.{key}"
        for table in tables
        for key in sorted(set(tree_a[table]) | set(tree_b[table]))
        if key not in _HARMLESS and tree_a[table].get(key) != tree_b[table].get(key)
    ]


def make_teacher(run: Run) -> float:
    """Take the teacher that the configuration names, or train one."""
    began = time.monotonic()
    source = run.config.teacher.source
    if source:
        unet = load_teacher(source)
        if unet.config.in_channels != run.config.data.channels:
            raise ConfigError(
                f"{source} makes images with {unet.config.in_channels} channels, but "
                f"data.channels={run.config.data.channels}"
            )
        if unet.config.sample_size is None:
            unet.config = dataclasses.replace(unet.config, sample_size=run.config.data.size)
        save_teacher(unet, run.folder / "teacher")
        return time.monotonic() - began
    images = run.images()
    if images is None:
        raise ConfigError("there is neither a teacher to take nor data to train one on")
    return train_teacher(run.config, images.train, run.folder)


def make_trajectories(run: Run) -> float:
    """Draw the teacher's trajectories."""
    unet = run.teacher()
    settings = run.config.trajectory
    folder = run.folder / "trajectories"
    earlier = folder / "seconds.json"  # of sessions that were stopped
    before = read_json(earlier)["seconds"] if earlier.is_file() else 0.0
    began = time.monotonic() - before
    index = index_of(
        unet, settings, len(run.config.student.stages), run.config.run.seed, run.config.data.size
    )
    with StopSignals() as stop, progress_bar("trajectories", settings.num, unit="image") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        threads = run.config.run.threads
        store = sample_trajectories(
            unet, folder, index, settings.num, threads, report, lambda: stop.requested
        )
    if store is None or stop.requested:
        write_json(earlier, {"seconds": time.monotonic() - began})
        raise Interrupted("stopped while drawing trajectories; finished shards are kept")
    earlier.unlink(missing_ok=True)
    return time.monotonic() - began


def make_student(run: Run) -> float:
    """Distill the student."""
    store = Trajectories(run.folder / "trajectories", run.config.trajectory.num)
    images = run.images()
    return distill_student(run.config, store, run.folder, None if images is None else images.train)


def features_of(run: Run) -> FeatureNet:
    """The network that judges: configured, shipped where it fits, else fitted on the data."""
    config, images = run.config, run.images()
    if config.evaluate.features:
        return load_features(resolve(config.evaluate.features))
    own = run.folder / "features"
    if (own / "config.json").is_file():
        return load_features(own)
    if (config.data.size, config.data.channels) == (28, 1):
        return load_features()
    train = _drawn_images(run) if images is None else images.train
    save_features(fit_features(train, settings=FitSettings(steps=400, flip=config.data.flip)), own)
    return load_features(own)


def _drawn_images(run: Run) -> ImageSet:
    """What stands in for training images where there are none: what the trajectories end in."""
    count = min(2000, run.config.trajectory.num)
    store = Trajectories(run.folder / "trajectories", count)
    ends = [store.targets(part)[:, -1].clamp(-1, 1) for part in torch.arange(count).split(50)]
    return ImageSet(torch.cat(ends).numpy(), None, "samples of the teacher")


def make_evaluation(run: Run) -> float:
    """Judge teacher and student, and measure their speed, into report/summary.json."""
    began = time.monotonic()
    figures, protocol, features = figures_of_run(run)
    teacher, student, steps = run.teacher(), run.student(), run.config.evaluate.teacher_steps
    summary = figures | _costs(teacher, student, steps)
    summary |= {
        "name": run.config.name,
        "student_family": student.config.family,
        "teacher_steps": steps,
        "protocol": protocol,
        "features": features,
    }
    if run.class_names is not None:
        summary["class_names"] = run.class_names
    write_json(run.folder / "report" / "summary.json", summary)
    return time.monotonic() - began


def figures_of_run(run: Run, fresh: bool = False) -> tuple[dict[str, Any], str, str]:
    """Figures of real images, teacher and student; the protocol and the features, in words.

    A stored evaluation of the teacher is used where it fits, unless `fresh`; what is sampled anew
    is stored in the run's folder.
    """
    settings, images = run.config.evaluate, run.images()
    teacher, student, net = run.teacher(), run.student(), features_of(run)
    num, steps = settings.num, settings.teacher_steps
    with sampling_bar(3 if images is None else 2) as report:
        if images is None:
            reference = teacher_reference(net, teacher, num, steps, report)
        else:
            reference = images_reference(net, images.train, images.held_out)
        protocol = make_protocol(net, reference, teacher, num, steps)
        own = run.folder / "evaluation"
        figures = evaluate_networks(
            net, reference, protocol, teacher, student, own=own, fresh=fresh, callback=report
        )
    features = _features_words(run, net)
    return figures, protocol_words(protocol, reference, features), features


def _features_words(run: Run, net: FeatureNet) -> str:
    kind = net.kind
    if run.config.evaluate.features:
        return f"{kind} ({run.config.evaluate.features})"
    if not (run.folder / "features" / "config.json").is_file():
        return f"{kind} that ships with advkd"
    return f"{kind} fitted on the {'training images' if run.has_images else 'trajectories'}"


def _costs(teacher: UNet, student: Student, steps: int) -> dict[str, Any]:
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


def make_report(run: Run) -> float:
    """Draw the pictures and write report/report.html."""
    began = time.monotonic()
    summary = read_summary(run.folder / "report" / "summary.json")
    seconds = {stage: run.seconds(stage) for stage in STAGES[:-1]}
    summary["seconds"] = {stage: value for stage, value in seconds.items() if value is not None}
    metrics = read_metrics(run.folder / "metrics.jsonl")
    pictures = draw_pictures(run, summary["teacher_steps"])
    write_report(run.folder, summary, metrics, pictures, to_toml(run.config))
    return time.monotonic() - began


@torch.inference_mode()
def draw_pictures(run: Run, steps: int) -> Pictures:
    """Samples of teacher and student from the same x_T, real images, and the heads' path."""
    teacher, student, images = run.teacher(), run.student(), run.images()
    shape = (student.channels, student.size, student.size)
    numbers = torch.arange(PICTURED)
    y = sample_labels(EVALUATION_SEED, numbers, student.num_classes)
    settings = run.config.trajectory
    K = len(student.config.stages)
    table = table_of(teacher.schedule, "ddim", max(steps, K), 0.0)
    keep = saved_steps(len(table), K)
    kept = sample(
        teacher, table, EVALUATION_SEED, numbers, y=y, keep=keep, target=settings.target,
        size=shape[-1],
    )
    heads = student.states(sample_x_T(EVALUATION_SEED, numbers, shape), y)
    data = None
    if images is not None:
        train = images.train
        data = train.batch(np.random.default_rng(1).permutation(len(train))[:PICTURED])
    few = PICTURED_PATHS
    sizes = student.config.stages
    return Pictures(
        teacher=kept[-1].clamp(-1, 1),
        student=heads[-1].clamp(-1, 1),
        data=data,
        trajectory=[area_resized(x[:few], s) for x, s in zip(kept, sizes, strict=True)],
        heads=[x[:few] for x in heads],
        times=[int(table.timesteps[i - 1]) if i < len(table) else 0 for i in keep],
    )


_MAKERS: dict[str, Callable[[Run], float]] = {
    "teacher": make_teacher,
    "trajectories": make_trajectories,
    "distill": make_student,
    "evaluate": make_evaluation,
    "report": make_report,
}


def run_stages(run: Run, stages: tuple[str, ...]) -> None:
    """Carry out these stages in order; each needs the ones before it to stand."""
    if "distill" in stages:
        run.check()
    for stage in stages:
        missing = [s for s in STAGES[: STAGES.index(stage)] if not run.is_done(s)]
        if missing:
            raise CheckpointError(f"stage {stage} needs {missing[0]}, which {run.folder} lacks")
        run.make(stage)
