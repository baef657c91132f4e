"""`python -m advkd.evaluate`: evaluate a run or networks on their own, or fit features."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advkd import device
from advkd.cli import add_device, add_threads, guarded, use_threads
from advkd.config import EvaluateConfig, override
from advkd.console import StopSignals, progress_bar
from advkd.data import DataError, Dataset, find, for_shape, load_images
from advkd.data.registry import DEFAULT, default_dataset
from advkd.data.split import RealImages, hold_out, real_images
from advkd.device import placed
from advkd.engine.interface import input_shape
from advkd.evaluation.features import (
    FeatureNet,
    FitSettings,
    fit_features,
    load_features,
    reconstruction_error,
    save_features,
)
from advkd.evaluation.protocol import (
    check_blocks,
    evaluate_networks,
    images_reference,
    make_protocol,
    protocol_words,
    sampling_bar,
)
from advkd.files import CheckpointError
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher, resolve
from advkd.report.tables import quality_table
from advkd.run.evaluation import features_of_dataset, figures_of_run
from advkd.run.folder import stored_config
from advkd.run.run import Run

# What to do, and the options that go with it.
MODES = {
    "run": ("fresh",),
    "networks": (
        "student",
        "teacher",
        "scheduler",
        "data",
        "no_crop",
        "features",
        "num",
        "blocks",
        "teacher_steps",
        "fresh",
    ),
    "fit_features": ("out", "steps", "seed", "size", "channels", "no_crop", "no_flip"),
}
NUM, BLOCKS, TEACHER_STEPS = 4000, 2, EvaluateConfig.teacher_steps
EPILOG = """\
One of three things at a time:
  --run runs/NAME                evaluates the run's teacher and student by the run's own protocol;
  --student and/or --teacher     evaluates networks on their own, against the held-out images of
                                 --data (at most 2,000), or of the data set that ships in the shape
                                 of their images, by the features that come with it;
  --fit-features DATA --out F    fits the network whose features images are compared by:
                                 an autoencoder, and a classifier too where the data have labels.
                                 DATA is a path, the name of a data set, or `shipped` for {default}.
Where an evaluation of the teacher by the very same protocol ships with advkd, or is stored in the
run, its images are not sampled again unless you say --fresh.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd evaluate`."""
    p = argparse.ArgumentParser(
        prog="advkd evaluate",
        description="Evaluate networks beside real images, or fit the features for it.",
        epilog=EPILOG.format(default=DEFAULT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--run", metavar="FOLDER", type=Path, help="a run of advkd train")
    p.add_argument("--fresh", action="store_true", default=None, help="sample the teacher anew")
    p.add_argument("--student", metavar="FOLDER", help="a student, or zoo:NAME")
    p.add_argument("--teacher", metavar="FOLDER", help="a DDPM, or zoo:NAME")
    p.add_argument("--scheduler", metavar="FOLDER", help="where scheduler_config.json is")
    p.add_argument("--data", metavar="PATH", help="real images, or a data set (default: see below)")
    p.add_argument("--features", metavar="FOLDER", help="fitted by --fit-features")
    p.add_argument("--num", type=int, help=f"images of each network (default {NUM:,})")
    p.add_argument("--blocks", type=int, metavar="B", help=f"they are split into ({BLOCKS})")
    p.add_argument("--teacher-steps", type=int, metavar="N", help=f"default {TEACHER_STEPS}")
    fit = p.add_argument_group("fitting features")
    fit.add_argument("--fit-features", metavar="DATA", help="path, data set or `shipped`")
    fit.add_argument("--out", metavar="FOLDER", type=Path, help="where the features go")
    fit.add_argument("--steps", type=int, help=f"default {FitSettings.steps}")
    fit.add_argument("--seed", type=int, help="default 0")
    fit.add_argument("--size", type=int, help="pixels of a side that the data are resized to")
    fit.add_argument("--channels", type=int, choices=(1, 3), help="grayscale or RGB")
    fit.add_argument(
        "--no-flip", action="store_true", default=None, help="do not mirror (letters, digits)"
    )
    p.add_argument(
        "--no-crop", action="store_true", default=None, help="resize both sides, cut nothing off"
    )
    add_device(p)
    add_threads(p)
    return p


def mode_of(args: argparse.Namespace) -> str:
    """Which of MODES is meant; ValueError where that is unclear, or an option does not go along."""
    meant = {
        "run": args.run is not None,
        "networks": args.student is not None or args.teacher is not None,
        "fit_features": args.fit_features is not None,
    }
    modes = [mode for mode, is_meant in meant.items() if is_meant]
    if len(modes) != 1:
        raise ValueError("give either --run, or --student and --teacher, or --fit-features")
    mode = modes[0]
    every = {option for options in MODES.values() for option in options}
    for option in sorted(every - set(MODES[mode])):
        if getattr(args, option) is not None:
            wrong, name = (f"--{word.replace('_', '-')}" for word in (option, mode))
            where = "--student or --teacher" if mode == "networks" else name
            raise ValueError(f"{wrong} does not go with {where}")
    return mode


def evaluate_run(args: argparse.Namespace) -> None:
    """Evaluate a run's teacher and student by the run's configuration."""
    config = stored_config(args.run)
    if args.device != "auto":
        config = override(config, [f'run.device="{args.device}"'])
    run = Run(args.run, config)
    with run.opened():
        for stage in ("teacher", "distill"):
            if not run.is_done(stage):
                raise CheckpointError(f"{args.run} has not finished stage {stage} of advkd train")
        found = figures_of_run(run, fresh=bool(args.fresh))
    _show(found.figures, found.class_names, found.protocol)


def _show(figures: Mapping[str, Any], class_names: Sequence[str] | None, protocol: str) -> None:
    print(quality_table(figures, class_names, sys.stdout.encoding))
    # A path stays whole.
    words = textwrap.fill(protocol, 100, break_long_words=False, break_on_hyphens=False)
    print(f"\n{words}")


def compare_networks(args: argparse.Namespace) -> None:
    """Evaluate a student, a teacher or both against held-out images."""
    num = NUM if args.num is None else args.num
    blocks = BLOCKS if args.blocks is None else args.blocks
    check_blocks(num, blocks)
    place = device.resolve(args.device)
    student = None if args.student is None else placed(load_student(args.student), place)
    teacher = None
    if args.teacher is not None:
        teacher = placed(load_teacher(args.teacher, args.scheduler), place)
    channels, size = _shape(student, teacher)
    dataset = find(args.data) if args.data else for_shape(size, channels)
    source = dataset or args.data
    if not source:
        raise DataError(
            f"no data set ships with {size}x{size} pixels and {channels} channels: give --data"
        )
    net, features = _features(args.features, dataset, size, channels)
    net = placed(net, place)
    images = real_images(source, size, channels, not args.no_crop)
    steps = TEACHER_STEPS if args.teacher_steps is None else args.teacher_steps
    reference = images_reference(net, images.train, images.held_out)
    protocol = make_protocol(net, reference, teacher, num, blocks, steps)
    networks = [network for network in (teacher, student) if network is not None]
    with sampling_bar(len(networks)) as report:
        figures = evaluate_networks(
            net, reference, protocol, teacher, student, fresh=bool(args.fresh), callback=report
        )
    _show(figures, net.class_names, protocol_words(protocol, reference, features))


def _shape(student: Student | None, teacher: UNet | None) -> tuple[int, int]:
    """(channels, pixels of a side) of the networks' images, which must be the same."""
    shapes = set()
    if student is not None:
        shapes.add((student.channels, student.size))
    if teacher is not None:
        shapes.add(input_shape(teacher)[:2])
    if len(shapes) > 1:
        raise ValueError("teacher and student make images of different sizes or channels")
    return shapes.pop()


def _features(
    folder: str | None, dataset: Dataset | None, size: int, channels: int
) -> tuple[FeatureNet, str]:
    """The feature network, the data set's unless given by its folder, and what it is in words."""
    if folder is not None:
        net = load_features(resolve(folder))
        return net, f"{net.kind} ({folder})"
    title = "these images" if dataset is None else dataset.title or dataset.name
    found = features_of_dataset(dataset, size, channels)
    if found is not None:
        return found, f"{found.kind} that comes with {title}"
    raise ValueError(
        f"no features come with {title} of {channels}x{size}x{size}: fit some with --fit-features "
        "DATA --out FOLDER, then give --features FOLDER"
    )


def _images_to_fit(args: argparse.Namespace, dataset: Dataset | None) -> RealImages:
    """Images to fit features to, and others to try them on."""
    path, crop = args.fit_features, not args.no_crop
    if dataset is None:
        return hold_out(load_images(path, size=args.size, channels=args.channels, crop=crop))
    size, channels = args.size or dataset.size, args.channels or dataset.channels
    return real_images(dataset, size, channels, crop)


def fit(args: argparse.Namespace) -> None:
    """Fit features, save them and say how good they are on held-out images."""
    if args.out is None:
        raise ValueError("--fit-features needs --out FOLDER")
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} holds features already, and figures by them would not last")
    name = args.fit_features
    dataset = default_dataset() if name == "shipped" else find(name)
    images = _images_to_fit(args, dataset)
    settings = FitSettings(
        steps=FitSettings.steps if args.steps is None else args.steps,
        seed=args.seed or 0,
        flip=not args.no_flip and (dataset is None or dataset.flip),
    )
    with StopSignals() as stop, progress_bar("features", settings.steps) as bar:

        def report(step: int, loss: float) -> None:
            if stop.requested:
                raise KeyboardInterrupt
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        net = fit_features(
            images.train, settings=settings, held_out=images.held_out, progress=report,
            device=device.resolve(args.device),
        )  # fmt: skip
    save_features(net, args.out)
    count = f"{len(images.held_out):,} held-out images"
    if net.num_classes is None:
        quality = f"mean squared error {reconstruction_error(net, images.held_out):.4f} on {count}"
    else:
        quality = f"{100 * net.record['held_out_accuracy']:.2f}% right on {count}"
    print(f"{args.out}: {net.kind}, {quality}")


def evaluate(args: argparse.Namespace) -> None:
    """Do the one thing that the arguments ask for."""
    actions = {"run": evaluate_run, "networks": compare_networks, "fit_features": fit}
    action = actions[mode_of(args)]
    use_threads(args.threads)
    action(args)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return guarded(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
