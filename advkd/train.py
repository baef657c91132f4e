"""`python -m advkd.train`: the main job, from a teacher to a judged one-pass student."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from advkd.cli import add_threads, guarded, use_threads
from advkd.config import (
    Config,
    ConfigError,
    config_for,
    load_preset,
    override,
    presets,
)
from advkd.data.images import load_images
from advkd.engine.sampling import shape_of
from advkd.pretrained import load_teacher
from advkd.report.inputs import read_summary
from advkd.report.tables import final_table
from advkd.run.stages import (
    STAGES,
    Run,
    has_images,
    run_stages,
)

DEFAULT_PRESET = "fashion-mnist"
EPILOG = """\
With no argument: take the teacher that ships, draw its trajectories, distill a student, judge both,
into runs/fashion-mnist/. With --data FOLDER all of it on your own images, teacher included. With
--teacher FOLDER a DDPM of yours is distilled (--data then serves judging only). Running the same
command again goes on where it was stopped. --set takes any key of the configuration, such as
distill.lr=2e-4; runs/NAME/config.toml lists them all.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd train`."""
    p = argparse.ArgumentParser(
        prog="advkd train",
        description="Distill a diffusion model into a one-pass generator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets())}, or a .toml")
    p.add_argument("--data", metavar="PATH", help="folder of images, .npz/.npy array or IDX file")
    p.add_argument("--teacher", metavar="FOLDER", help="a DDPM saved by diffusers or advkd")
    p.add_argument("--name", help="name of the run (default: the preset's, or the folder's)")
    p.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs go"
    )
    p.add_argument("--stage", choices=STAGES, help="this stage only (default: all)")
    p.add_argument("--redo", choices=STAGES, help="remove this stage and all later ones first")
    p.add_argument("--init", metavar="FOLDER", help="start the teacher's training from this one")
    p.add_argument("--size", type=int, help="pixels of a side that --data is resized to")
    p.add_argument("--channels", type=int, choices=(1, 3), help="greyscale or RGB")
    p.add_argument("--no-crop", action="store_true", help="resize both sides instead of cropping")
    p.add_argument("--no-flip", action="store_true", help="do not mirror training images")
    p.add_argument("--trajectories", type=int, metavar="N", help="how many the teacher draws")
    p.add_argument("--features", metavar="FOLDER", help="a feature network to judge by")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key")
    p.add_argument("--seed", type=int, help="seed of the run (default 0)")
    add_threads(p)
    return p


def configure(args: argparse.Namespace) -> Config:
    """The configuration that the command line means."""
    if args.preset or not (args.data or args.teacher):
        config = load_preset(args.preset or DEFAULT_PRESET)
    elif args.teacher:
        config = _for_teacher(args.teacher, args.size)
    else:
        images = load_images(args.data, size=args.size, channels=args.channels)
        config = config_for(images.size, images.channels)
    given = Path(args.teacher or args.data or "")
    own = given.stem if given.is_file() else given.name
    name = args.name or (config.name if args.preset or not own else own)
    return override(config, [f"name={_quoted(name)}", *_assignments(args), *args.set])


def _for_teacher(folder: str, size: int | None) -> Config:
    """A configuration around a given teacher: student and discriminator by its resolution."""
    unet = load_teacher(folder)
    channels, size, _ = shape_of(unet, size)
    config = config_for(size, channels)
    teacher = dataclasses.replace(config.teacher, source=folder)
    return dataclasses.replace(config, unet=unet.config, teacher=teacher)


def _assignments(args: argparse.Namespace) -> list[str]:
    """Options that are only shorter names of configuration keys."""
    given: dict[str, object] = {
        "data.path": args.data,
        "data.size": args.size,
        "data.channels": args.channels,
        "data.crop": "false" if args.no_crop else None,
        "data.flip": "false" if args.no_flip else None,
        "teacher.source": args.teacher,
        "teacher.init": args.init,
        "trajectory.num": args.trajectories,
        "evaluate.features": args.features,
        "run.seed": args.seed,
        "run.threads": args.threads or None,
    }
    if args.teacher is None and (args.data or args.stage == "teacher"):
        given["teacher.source"] = ""  # train one, also where the preset would take the zoo's
    return [
        f"{key}={_quoted(value) if key.split('.')[1] in _TEXT else value}"
        for key, value in given.items()
        if value is not None
    ]


_TEXT = ("path", "source", "init", "features")


def _quoted(value: object) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def train(args: argparse.Namespace) -> None:
    """Run the stages and print the closing table."""
    use_threads(args.threads)
    config = configure(args)
    if "/" in config.name or config.name in ("", ".", ".."):
        raise ConfigError(f"{config.name!r} is not a name for a run")
    run = Run(config, args.runs / config.name, has_images(config))
    with run.opened(args.redo):
        run_stages(run, (args.stage,) if args.stage else STAGES)
    if args.stage in (None, "report"):
        summary = read_summary(run.folder / "report" / "summary.json")
        print(final_table(summary, sys.stdout.encoding))
        print(f"\nreport: {run.folder / 'report' / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    again = "the same command" + (" without --redo" if args.redo else "")
    return guarded(lambda: train(args), again)


if __name__ == "__main__":
    sys.exit(main())
