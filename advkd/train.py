"""`python -m advkd.train`: the main job, from a teacher to a one-pass student and its report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from advkd import device, processes
from advkd.cli import add_device, add_threads, guarded, use_threads
from advkd.config import (
    TRACKERS,
    Config,
    ConfigError,
    as_tree,
    config_for,
    load_preset,
    override,
    presets,
    resolutions_for,
)
from advkd.data import dataset_names, find, probe
from advkd.data.hub import PREFIX
from advkd.engine.interface import input_shape
from advkd.hub import is_repository
from advkd.pretrained import load_teacher
from advkd.report.inputs import read_summary
from advkd.report.tables import final_table
from advkd.run.folder import STAGES, stored_config
from advkd.run.run import Run
from advkd.run.stages import run_stages

DEFAULT_PRESET = "fashion-mnist"
SHARES = 8  # of a batch that several processes compute, unless run.shares says otherwise
IMAGES_OF_A_CLASS = 100  # on average, or classes are not worth telling apart
EPILOG = """\
Without options: take the teacher that ships, sample its trajectories, distill a student and
evaluate both, into runs/fashion-mnist/. With --data PATH all of it on your own images, teacher
included. With --teacher FOLDER your own DDPM is distilled (--data then only serves the evaluation).
The same command again goes on where it was stopped. --set takes any key of the configuration, such
as distill.lr=2e-4; runs/NAME/config.toml lists them all.
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
    p.add_argument(
        "--data", metavar="PATH", help="folder or zip of images, array, IDX file, data set, hf:NAME"
    )
    p.add_argument("--teacher", metavar="FOLDER", help="a DDPM saved by diffusers or advkd")
    p.add_argument("--name", help="name of the run (default: the preset's, or the folder's)")
    p.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs go"
    )
    p.add_argument("--stage", choices=STAGES, help="only this stage (default: all)")
    p.add_argument("--redo", choices=STAGES, help="remove this stage and all later ones first")
    p.add_argument("--scheduler", metavar="FOLDER", help="the teacher's scheduler_config.json")
    p.add_argument("--init", metavar="FOLDER", help="start the teacher's training from this one")
    p.add_argument(
        "--size", type=int, help="pixels of a side: of --data, or of a teacher that names none"
    )
    p.add_argument("--channels", type=int, choices=(1, 3), help="grayscale or RGB")
    p.add_argument("--no-crop", action="store_true", help="resize both sides instead of cropping")
    p.add_argument("--no-flip", action="store_true", help="do not mirror training images")
    p.add_argument("--trajectories", type=int, metavar="N", help="how many to sample")
    p.add_argument("--features", metavar="FOLDER", help="a feature network to evaluate by")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key")
    p.add_argument(
        "--log", choices=TRACKERS, help="also show losses and images in a tracker (default: none)"
    )
    p.add_argument("--seed", type=int, help="seed of the run (default 0)")
    add_device(p)
    add_threads(p)
    return p


def configure(args: argparse.Namespace) -> Config:
    """The configuration that the command line means; paths are resolved."""
    if args.preset or not (args.data or args.teacher):
        config = load_preset(args.preset or DEFAULT_PRESET)
    elif args.teacher:
        config = _for_teacher(args.teacher, args.scheduler, args.size)
    else:
        config = _for_images(args)
    name = args.name or (config.name if args.preset else _name_of(args.data, args.teacher))
    name = name or config.name
    return override(config, [f"name={_quoted(name)}", *_assignments(args), *args.set])


def _name_of(data: str | None, teacher: str | None) -> str | None:
    """A run's name from the file or folder that is given; None without either."""
    if teacher and teacher.startswith("zoo:"):
        return teacher.removeprefix("zoo:")
    given = teacher or data
    if not given:
        return None
    path = Path(given.removeprefix(PREFIX)).resolve()
    return path.stem if path.is_file() else path.name


def _for_images(args: argparse.Namespace) -> Config:
    """A configuration for given images: networks by their resolution, and conditional on classes of
    100 images or more on average."""
    source = probe(args.data, size=args.size, channels=args.channels, crop=not args.no_crop)
    num_classes = source.num_classes or 1
    serve = 2 <= num_classes <= len(source) // IMAGES_OF_A_CLASS
    try:
        return config_for(source.size, source.channels, num_classes if serve else None)
    except ConfigError as error:
        notes = "".join(f"; {note}" for note in source.notes)
        raise ConfigError(f"{args.data}: {error} by --size{notes}") from None


def _for_teacher(folder: str, scheduler: str | None, size: int | None) -> Config:
    """A configuration around a given teacher: student and discriminator by its resolution."""
    unet = load_teacher(folder, scheduler)
    channels, size, _ = input_shape(unet, None if size is None else (size, size))
    try:
        resolutions_for(size)
    except ConfigError:
        raise ConfigError(
            f"{folder} makes images of {size}x{size} pixels, and no student is designed for that "
            f"size by itself, since {size} cannot be halved down to 8 or less: give a --preset "
            "whose student.stages end in that size"
        ) from None
    config = config_for(size, channels)
    T = unet.schedule.num_train_timesteps
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(unet.config, sample_size=size),
        teacher=dataclasses.replace(config.teacher, source=folder),
        trajectory=dataclasses.replace(config.trajectory, steps=min(config.trajectory.steps, T)),
        evaluate=dataclasses.replace(
            config.evaluate, teacher_steps=min(config.evaluate.teacher_steps, T)
        ),
    )


def _assignments(args: argparse.Namespace) -> list[str]:
    """Options that are only shorter names of configuration keys."""
    paths = {
        "data.path": args.data,
        "teacher.source": args.teacher,
        "teacher.scheduler": args.scheduler,
        "teacher.init": args.init,
        "evaluate.features": args.features,
    }
    if args.teacher is None and (args.data or args.stage == "teacher"):
        paths["teacher.source"] = ""  # train one, also where the preset would take the zoo's
    dataset = find(args.data) if args.data else None
    mirrored = not args.no_flip and (dataset is None or dataset.flip)
    plain: dict[str, object] = {
        "data.size": args.size,
        "data.channels": args.channels,
        "data.crop": "false" if args.no_crop else None,
        "data.flip": None if mirrored else "false",
        "trajectory.num": args.trajectories,
        "run.seed": args.seed,
        "run.log": args.log,
        "run.threads": args.threads or None,
        "run.device": None if args.device == "auto" else _quoted(args.device),
    }
    given = [f"{key}={_quoted(_resolved(path))}" for key, path in paths.items() if path is not None]
    return given + [f"{key}={value}" for key, value in plain.items() if value is not None]


def _resolved(path: str) -> str:
    """A path that means the same from any folder; "", "zoo:NAME" and a data set's name stay, also
    one of the hub, and so does a network's repository there."""
    if path.startswith(PREFIX):
        place = Path(path.removeprefix(PREFIX)).expanduser()
        return f"{PREFIX}{place.resolve()}" if place.is_dir() else path
    is_name = path.startswith("zoo:") or is_repository(path)
    is_name = is_name or (path in dataset_names() and not Path(path).exists())
    return path if not path or is_name else str(Path(path).resolve())


def _quoted(value: object) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def train(args: argparse.Namespace) -> None:
    """Run the stages, with the other processes if a launcher has started several, and print the
    closing table."""
    use_threads(args.threads)
    config = configure(args)
    if "/" in config.name or config.name in ("", ".", ".."):
        raise ConfigError(f"{config.name!r} is not a name for a run")
    with processes.joined(device.resolve(config.run.device)):
        config = _for_processes(config, args.runs / config.name)
        _agree(config, args)
        run = Run(args.runs / config.name, config)
        with run.opened(args.redo):
            run_stages(run, (args.stage,) if args.stage else STAGES)
        if processes.is_first():
            _conclude(run, args)


def _for_processes(config: Config, folder: Path) -> Config:
    """The configuration with as many shares of a batch as the run began with, or several processes
    need; and torch with this process's part of the cores."""
    count, shares = processes.count(), config.run.shares
    if not shares and (folder / "config.toml").is_file():
        shares = stored_config(folder).run.shares
    if count > 1 and not shares:
        shares = max(SHARES, count)
    if count > 1 and not config.run.threads and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores, here = len(os.sched_getaffinity(0)), processes.local_count()
        torch.set_num_threads(max(1, cores // here))  # the launcher has set 1
        if processes.is_first():
            words = f"{here} of {count} processes are on this machine, each with"
            threads = (
                f"{torch.get_num_threads()} of {cores} threads (--threads N for another number)"
            )
            print(f"advkd: {words} {threads}", file=sys.stderr)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, shares=shares))


def _agree(config: Config, args: argparse.Namespace) -> None:
    """ConfigError where the processes were not started with the same configuration."""
    keys = {"--stage": args.stage, "--redo": args.redo}
    for table, entries in as_tree(config).items():
        if isinstance(entries, dict):
            keys |= {f"{table}.{key}": value for key, value in entries.items()}
        else:
            keys[table] = entries
    del keys["run.threads"]
    found = [json.loads(text) for text in processes.exchange(json.dumps(keys))]
    for rank, theirs in enumerate(found):
        differing = [key for key in keys if theirs.get(key) != found[0].get(key)]
        if differing:
            raise ConfigError(
                f"process {rank} was started with another {', '.join(differing)} than process 0"
            )


def _conclude(run: Run, args: argparse.Namespace) -> None:
    """Print what the call was for."""
    if args.stage:
        seconds = run.seconds(args.stage)
        print(f"stage {args.stage}: {run.marker(args.stage).parent}, {seconds:.1f} s")
    if args.stage in (None, "report"):
        summary = read_summary(run.path / "report" / "summary.json")
        print(final_table(summary, sys.stdout.encoding))
        print(f"\nreport: {run.path / 'report' / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    again = "the same command" + (" without --redo" if args.redo else "")
    code = guarded(lambda: train(args), again)
    if code and processes.launched() > 1:
        sys.stderr.flush()
        os._exit(code)  # threads of torch may wait for a process that is gone
    return code


if __name__ == "__main__":
    sys.exit(main())
