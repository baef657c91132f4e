"""Whatever a stage would refuse, refused before the first begins, by setting and value."""

from __future__ import annotations

from advkd import device, processes
from advkd.config import Config, ConfigError, as_tree, build
from advkd.data import for_shape
from advkd.diffusion import Schedule
from advkd.engine.interface import input_shape
from advkd.engine.sampling import table_of
from advkd.evaluation.features import load_features
from advkd.evaluation.protocol import check_blocks
from advkd.models.discriminator import Discriminator
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import resolve
from advkd.run.run import Run
from advkd.run.trackers import tracker_library
from advkd.training.distill import check_settings
from advkd.training.teacher import check_data


def check(run: Run, stages: tuple[str, ...]) -> None:
    """ConfigError, or the ValueError of the part that refuses, for what one of the stages would
    refuse after hours of earlier ones."""
    config = run.config
    build(Config, as_tree(config), "")
    device.resolve(config.run.device)
    _check_processes(config)
    if config.run.log != "none" and processes.is_first():
        tracker_library(config.run.log)
    teacher = teacher_on_meta(run)
    _check_images(run, teacher)
    if stages == ("teacher",):
        return
    _check_trajectories(config, teacher)
    _check_networks(config, teacher)
    _check_evaluation(run, teacher)


def _check_processes(config: Config) -> None:
    """A batch can be cut into a share for each process."""
    count, exact = processes.count(), config.run.reduce == "exact"
    if exact and 0 < config.run.shares < count:
        raise ConfigError(f"run.shares={config.run.shares} are too few for {count} processes")
    for name, batch in (("teacher", config.teacher.batch), ("distill", config.distill.batch)):
        if batch < count:
            raise ConfigError(f"{name}.batch={batch} is too small for {count} processes")


def teacher_on_meta(run: Run) -> UNet:
    """The teacher that the run has, takes or would train, without weights."""
    config = run.config
    if run.is_done("teacher"):
        return run.stored_teacher().to("meta")
    if config.teacher.source:
        return run.given_teacher().to("meta")
    with device.without_memory():
        return UNet(config.unet, Schedule(**vars(config.schedule)))


def _check_images(run: Run, teacher: UNet) -> None:
    """The images fit the teacher, where there are any."""
    data = run.config.data
    if data.channels not in (1, 3):
        raise ConfigError(f"data.channels={data.channels} is neither 1 nor 3")
    channels = teacher.config.in_channels
    if channels != data.channels:
        raise ConfigError(
            f"the teacher makes images with {channels} channels, but data.channels={data.channels}"
        )
    if teacher.config.sample_size not in (None, data.size):
        side = teacher.config.sample_size
        raise ConfigError(f"the teacher makes images of {side}x{side}, but data.size={data.size}")
    input_shape(teacher, (data.size, data.size))
    if data.clusters and teacher.num_classes != data.clusters:
        raise ConfigError(
            f"data.clusters={data.clusters} take the place of classes, and the teacher has "
            f"{teacher.num_classes or 'none'}: one trained with unet.num_class_embeds="
            f"{data.clusters} is needed"
        )
    images = run.images()
    if images is None:
        if not run.config.teacher.source:
            fitting = for_shape(data.size, data.channels)
            advice = f", such as {fitting.name}" if fitting else ""
            raise ConfigError(
                "there is neither a teacher to take nor data to train one on: give --teacher or "
                f"--data{advice}"
            )
    elif not (run.config.teacher.source or run.is_done("teacher")):
        check_data(run.config, images.train)


def _check_trajectories(config: Config, teacher: UNet) -> None:
    """The sampler has enough steps, and no more than the teacher was trained with."""
    t = config.trajectory
    T = teacher.schedule.num_train_timesteps
    if t.sampler == "ddim" and t.steps > T:
        raise ConfigError(f"trajectory.steps={t.steps} is more than the teacher's {T} times")
    table = table_of(teacher.schedule, t.sampler, t.steps, t.eta)
    if len(config.student.stages) > len(table):
        raise ConfigError(
            f"student.stages has {len(config.student.stages)} entries, but trajectory.steps="
            f"{len(table)}: each needs a step of its own"
        )


def _check_networks(config: Config, teacher: UNet) -> None:
    """Student and discriminator can be built, and trained as configured."""
    check_settings(config.distill, len(config.student.stages))
    size, channels = config.data.size, config.data.channels
    with device.without_memory():
        Student(config.student, size, channels, config.trajectory.target, teacher.num_classes)
        Discriminator(
            config.discriminator,
            size,
            channels,
            config.student.stages,
            teacher.num_classes,
            config.distill.adversary == "paired",
        )


def _check_evaluation(run: Run, teacher: UNet) -> None:
    """The evaluation's sampler fits the teacher, and its features the images."""
    config = run.config
    check_blocks(config.evaluate.num, config.evaluate.blocks)
    steps, T = config.evaluate.teacher_steps, teacher.schedule.num_train_timesteps
    if steps > T:
        raise ConfigError(
            f"evaluate.teacher_steps={steps} is more than the teacher's {T} times; add --set "
            f"evaluate.teacher_steps={T} or fewer"
        )
    if len(config.student.stages) > T:
        raise ConfigError(f"the student has more submodules than the teacher's {T} times")
    table_of(teacher.schedule, "ddim", steps, 0.0)
    size, channels = config.data.size, config.data.channels
    if config.evaluate.features:
        net = load_features(resolve(config.evaluate.features))
        if (net.size, net.channels) != (size, channels):
            raise ConfigError(
                f"evaluate.features={config.evaluate.features} are for {net.size}x{net.size} "
                f"images with {net.channels} channels, not {size}x{size} with {channels}"
            )
    elif size < 8:
        raise ConfigError(f"data.size={size} is below 8, the least that features can be fitted on")
