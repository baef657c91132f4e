"""`python -m advkd.sample`: images of a student in one network pass, or of a teacher in many."""

from __future__ import annotations

import argparse
import ctypes
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from advkd.cli import add_device, add_dtype, add_threads, guarded
from advkd.data.sentences import brief
from advkd.deploy.prepared import Prepared, find, grid_png, key_of
from advkd.files import write_bytes
from advkd.names import SAMPLERS

# numpy waits until it is needed: one image of a student takes less time than its import.
if TYPE_CHECKING:
    import numpy as np

SHIPPED = "zoo:fashion-mnist-student"
TEACHER_STEPS = 50
MOST_PIXELS = 1 << 20  # of images that are sampled without a progress bar
TILE = 64  # pixels: small images are enlarged by a whole factor up to this side
EPILOG = """\
An image depends on --seed and its number alone: --first 10 --num 1 gives the eleventh of --num 64
again. Without --student and --teacher, the student that ships is sampled. --out takes a grid of all
images; --npz an archive of the arrays `images`, float32 (N, C, H, W) in [-1, 1], and `labels`,
int64 (N,), for a class-conditional network. --class takes a class's name, in any case, or its
number; `advkd info --plan FOLDER` lists both.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd sample`."""
    p = argparse.ArgumentParser(
        prog="advkd sample",
        description="Sample images from a student in one network pass, or from a teacher in many.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = p.add_mutually_exclusive_group()
    model.add_argument("--student", metavar="FOLDER", help=f"a student (default: {SHIPPED})")
    model.add_argument("--teacher", metavar="FOLDER", help="a DDPM saved by diffusers or advkd")
    p.add_argument("--num", type=int, default=64, metavar="N", help="how many images (default 64)")
    p.add_argument("--seed", type=int, default=0, help="0 to 2^64 - 1 (default 0)")
    p.add_argument("--first", type=int, default=0, metavar="n", help="number of the first image")
    p.add_argument("--out", metavar="FILE", type=Path, help="PNG (default: samples.png)")
    p.add_argument("--npz", metavar="FILE", type=Path, help="the numbers; without --out no PNG")
    p.add_argument("--class", dest="label", metavar="c", help="only this class: a number or a name")
    p.add_argument("--exit-at", type=int, metavar="k", help="student: leave after submodule k")
    p.add_argument("--steps", type=int, help=f"teacher, ddim: default {TEACHER_STEPS}")
    p.add_argument("--eta", type=float, help="teacher, ddim: 0 (default) adds no noise, 1 most")
    p.add_argument("--sampler", choices=SAMPLERS, help="teacher: default ddim; ddpm = all steps")
    p.add_argument("--scheduler", metavar="FOLDER", help="teacher: where scheduler_config.json is")
    p.add_argument("--size", type=int, metavar="S", help="teacher that names none: pixels a side")
    add_device(p)
    add_dtype(p)
    add_threads(p)
    return p


def sample(args: argparse.Namespace) -> None:
    """Sample the images, write them and say so in one line."""
    _check(args)
    if not args.teacher:
        args.student = args.student or SHIPPED
    if args.steps is None:
        args.steps = TEACHER_STEPS
    source = _opened(args)
    png = args.out or (None if args.npz else Path("samples.png"))
    if png is not None and source.channels not in (1, 3):
        raise ValueError(
            f"a PNG has 1 or 3 channels, these images {source.channels}: use --npz alone"
        )
    label = _label(args.label, source)
    drawn = None
    if png is not None and args.npz is None and isinstance(source, Prepared):
        drawn = _draw(args, source, label, png)
    sides, seconds = drawn or _write(args, source, label, png)
    shape = "x".join(map(str, sides))
    files = ", ".join(str(path) for path in (png, args.npz) if path is not None)
    print(
        f"{args.num} images ({shape}) of {_words(args, source, label)}, seed {args.seed}, "
        f"in {seconds:.2f} s: {files}",
        flush=True,
    )
    source.prepare()


def _draw(
    args: argparse.Namespace, source: Prepared, label: int | None, png: Path
) -> tuple[Sequence[int], float] | None:
    """Sample the images and draw their grid without numpy, where they are few; their (C, H, W) and
    the seconds of sampling, or None."""
    began = time.monotonic()
    pixels = source.pixels(args, label)
    seconds = time.monotonic() - began
    if pixels is None:
        return None
    shape = source.shape(args.exit_at)
    write_bytes(png, grid_png(pixels, shape, *_columns_and_scale(args.num, shape[-1])))
    return shape, seconds


def _write(
    args: argparse.Namespace, source: Source, label: int | None, png: Path | None
) -> tuple[Sequence[int], float]:
    """Sample the images and write the files that are asked for; their (C, H, W) and the seconds of
    sampling."""
    from advkd.report.pictures import image_grid, save_png

    y = _labels(args, source, label)
    began = time.monotonic()
    images = source.images(args, y)
    seconds = time.monotonic() - began
    if png is not None:
        save_png(png, image_grid(images, *_columns_and_scale(len(images), images.shape[-1])))
    if args.npz is not None:
        write_bytes(args.npz, _npz(images, y))
    return images.shape[1:], seconds


def _columns_and_scale(num: int, side: int) -> tuple[int, int]:
    """Of a grid of so many images."""
    return math.ceil(math.sqrt(num)), max(1, TILE // side)


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together before anything is loaded."""
    if args.num < 1:
        raise ValueError(f"--num {args.num} is below 1")
    if not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed {args.seed} is not between 0 and 2^64 - 1")
    if not 0 <= args.first < (1 << 63) - args.num:
        raise ValueError(f"--first {args.first} is not between 0 and 2^63 - 1 - --num")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size} is below 1")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} is below 1")
    for option, suffix in (("out", ".png"), ("npz", ".npz")):
        path = getattr(args, option)
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise ValueError(f"--{option} {path} does not name a {suffix} file")
    if args.teacher and args.exit_at is not None:
        raise ValueError("--exit-at is for a student; a teacher takes --steps")
    teachers = ("steps", "eta", "sampler", "scheduler", "size")
    given = [f"--{option}" for option in teachers if getattr(args, option) is not None]
    if given and not args.teacher:
        raise ValueError(f"{', '.join(given)} needs --teacher: a student takes one network pass")
    if args.sampler == "ddpm" and not (args.steps is None and args.eta is None):
        raise ValueError("--sampler ddpm takes all steps of the schedule: no --steps and no --eta")


class Source(Protocol):
    """What images are sampled from."""

    channels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None

    def labels(self, num: int, seed: int, first: int) -> np.ndarray:
        """Labels (num,) int64 of images number `first` and later, where there are classes."""

    def images(self, args: argparse.Namespace, y: np.ndarray | None) -> np.ndarray:
        """The images that the options ask for, (N, C, H, W) float32 in [-1, 1]."""

    def prepare(self) -> None:
        """Make the next start faster, where that can be."""


def _opened(args: argparse.Namespace) -> Source:
    """The network that is asked for: a student without torch where that can be, else by torch."""
    prepared = _prepared(args)
    if prepared is not None:
        return prepared
    from advkd.sample_network import SampledNetwork

    return SampledNetwork(args)


def _prepared(args: argparse.Namespace) -> Prepared | None:
    """The student, where torch would run it by the engine of the CPU and it is prepared for that.

    None as well where there is something to say about the options, and for so many images that
    torch's import matters less than a progress bar.
    """
    if args.teacher or args.threads < 0 or args.dtype != "float32":
        return None
    on_cpu = args.device == "cpu" or (args.device == "auto" and not has_gpu_driver())
    if not on_cpu or os.environ.get("ADVKD_OPS", "") not in ("", "fused"):
        return None
    key = key_of(args.student)
    student = None if key is None else find(key)
    if student is None or args.num * student.heads[-1] ** 2 > MOST_PIXELS:
        return None
    # Of a student of noisy states the file has the last head only, whatever its number.
    return None if args.exit_at is not None and len(student.heads) == 1 else student


def has_gpu_driver() -> bool:
    """Whether torch might find a GPU here: CUDA's driver, or ROCm's, is there."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _label(given: str | None, source: Source) -> int | None:
    """The class that --class means: by its name, by its number, or by its name in another case."""
    if given is None:
        return None
    if source.num_classes is None:
        raise ValueError("--class needs a class-conditional network, and this one is not")
    names = source.class_names or ()
    if given in names:
        return names.index(given)
    try:
        number = int(given)
    except ValueError:
        return _label_by_name(given, names, source.num_classes)
    if not 0 <= number < source.num_classes:
        raise ValueError(f"--class {number} is not between 0 and {source.num_classes - 1}")
    return number


def _label_by_name(given: str, names: Sequence[str], num_classes: int) -> int:
    """The only class whose name is the given one but for the case of its letters."""
    shown = brief(repr(given))
    if not names:
        raise ValueError(
            f"--class {shown}: this network's classes have no names, only numbers from 0 to "
            f"{num_classes - 1}"
        )
    found = [label for label, name in enumerate(names) if name.casefold() == given.casefold()]
    if not found:
        from advkd.config import nearest

        advice = brief(nearest(given, names))
        raise ValueError(f"--class {shown} names no class of this network{advice}")
    if len(found) > 1:
        several = " and ".join(brief(repr(names[label])) for label in found[:2])
        raise ValueError(f"--class {shown} could be {several}")
    return found[0]


def _labels(args: argparse.Namespace, source: Source, label: int | None) -> np.ndarray | None:
    """Labels y (N,) int64 of the images, or None for an unconditional network."""
    if source.num_classes is None:
        return None
    if label is not None:
        import numpy as np

        return np.full(args.num, label, np.int64)
    return source.labels(args.num, args.seed, args.first)


def _npz(images: np.ndarray, y: np.ndarray | None) -> bytes:
    """An .npz file's bytes."""
    import numpy as np

    arrays = {"images": images} | ({} if y is None else {"labels": y})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _words(args: argparse.Namespace, source: Source, label: int | None) -> str:
    """What was sampled, and how."""
    of = "" if label is None else f", class {label}"
    if label is not None and source.class_names is not None:
        of += f" ({brief(source.class_names[label], 60)})"
    if not args.teacher:
        early = "" if args.exit_at is None else f" up to submodule {args.exit_at}"
        return f"{args.student} in one network pass{early}{of}"
    if args.sampler == "ddpm":
        return f"{args.teacher} by DDPM{of}"
    return f"{args.teacher} by DDIM in {args.steps} steps, eta {args.eta or 0:g}{of}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return guarded(lambda: sample(args))


if __name__ == "__main__":
    sys.exit(main())
