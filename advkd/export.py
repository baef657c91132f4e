"""`python -m advkd.export`: a student as a file for other places.

The formats are a model file for the C library (`advkd`), a page that generates in a browser
(`html`), ONNX (`onnx`) and a program of torch.export (`pt2`). A file is compared with the student
before it takes its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from advkd.cli import guarded
from advkd.deploy.graph import inputs, largest_difference, traced, write_onnx, write_pt2
from advkd.deploy.model_file import DTYPES, difference_of, model_bytes
from advkd.deploy.page import page
from advkd.files import CheckpointError, replacing
from advkd.models.student import Student
from advkd.pretrained import load_student, resolve

GRAPHS = ("onnx", "pt2")
FORMATS = (*GRAPHS, "advkd", "html")
TOLERANCE = 1e-4  # of the images, whose values span [-1, 1]
# The same where --dtype rounds the weights: rounding may show in a pixel, a mistake in all.
ROUNDED_TOLERANCES = {"float16": 1 / 64, "int8": 1 / 4}
EPILOG = """\
advkd  one file that the C library, advkd-generate and advkd.runtime read (docs/file-format.md). It
       holds all heads, for any batch.
html   one page that generates in a browser, offline: the same file with the C library inside.
onnx   a graph of plain operators. It needs: pip install 'advkd[export]'.
pt2    a program that torch.export.load reads, without advkd. torch.export.save would pickle the
       inputs the graph was traced with; they are left out, so the archive holds JSON and raw
       tensors and no pickle.

The two graphs take x_T, standard normal float32 (B, C, S, S), and for a class-conditional student
labels y, int64 (B,); they return the image (B, C, s, s), not clamped to [-1, 1]. A file is compared
with the student, ONNX in ONNX Runtime, and is not written where they differ by more than 1e-4.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd export`."""
    p = argparse.ArgumentParser(
        prog="advkd export",
        description="Write a student as a file for other places: C, a browser, ONNX, torch.export.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--student", metavar="FOLDER", required=True, help="a folder, or zoo:NAME")
    p.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    p.add_argument("--out", metavar="FILE", type=Path, help="default: the folder's name, .FORMAT")
    p.add_argument("--exit-at", type=int, metavar="k", help="graphs: leave after submodule k")
    p.add_argument("--batch", type=_batch, metavar="N", help="graphs: images a call; default: any")
    p.add_argument("--dtype", choices=DTYPES, help="advkd, html: of the weights; default: auto")
    p.add_argument("--title", help="html: default: the name of the folder or its run")
    return p


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'dynamic' nor a number from 1 up")
    return int(text)


def export(args: argparse.Namespace) -> None:
    """Write the file, check it, and say so in one line."""
    _check(args)
    student = load_student(args.student)
    folder = resolve(args.student).resolve()
    suffix = f".{args.format}"
    path = args.out or Path(folder.name + suffix)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"--out {path} does not name a {suffix} file")
    if args.format in GRAPHS:
        words, difference = _write_graph(args, student, path)
    else:
        words, difference = _write_model(args, student, path, args.title or _title(folder))
    size = path.stat().st_size / 1e6
    print(f"{path}: {size:.1f} MB, {words}, within {difference:.1g} of the student")


def _title(folder: Path) -> str:
    """The folder's name; or the run's, where it is the student of one."""
    of_run = folder.name == "student" and (folder.parent / "config.toml").is_file()
    return folder.parent.name if of_run else folder.name


def _check(args: argparse.Namespace) -> None:
    """Refuse options of another format."""
    is_graph = args.format in GRAPHS
    for option, of_graphs in (("exit_at", True), ("batch", True), ("dtype", False)):
        if getattr(args, option) is not None and is_graph != of_graphs:
            formats = " and ".join(GRAPHS if of_graphs else FORMATS[len(GRAPHS) :])
            raise ValueError(f"--{option.replace('_', '-')} is for the formats {formats}")
    if args.title is not None and args.format != "html":
        raise ValueError("--title is for the format html")


def _write_graph(args: argparse.Namespace, student: Student, path: Path) -> tuple[str, float]:
    """Write ONNX or torch.export; return what it maps to what, and how far it is off."""
    with torch.inference_mode():
        shape = student(*inputs(student, 1), exit_at=args.exit_at).shape[1:]
    program = traced(student, args.exit_at, args.batch)
    write = write_onnx if args.format == "onnx" else write_pt2
    with replacing(path) as temporary:
        run = write(program, temporary)
        difference = largest_difference(run, student, args.exit_at, args.batch)
        _refuse_wrong(path, difference, TOLERANCE)
    batch = args.batch or "batch"
    given = f"x_T ({batch}, {student.channels}, {student.size}, {student.size})"
    if student.num_classes is not None:
        given += f", y ({batch},)"
    image = ", ".join(str(side) for side in shape)
    return f"{given} -> image ({batch}, {image})", difference


def _write_model(
    args: argparse.Namespace, student: Student, path: Path, title: str
) -> tuple[str, float]:
    """Write a model file or a page; return what it makes, and how far it is off."""
    dtype = args.dtype or "auto"
    content = model_bytes(student, dtype)
    difference = difference_of(content, student)
    _refuse_wrong(path, difference, ROUNDED_TOLERANCES.get(dtype, TOLERANCE))
    if args.format == "html":
        shown = {} if Path(args.student).is_absolute() else {"student": args.student}
        text = page(content, title, **shown)
        content = text.encode("utf-8", "backslashreplace")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    words = f"images of {student.size}x{student.size} pixels"
    if student.num_classes is not None:
        words += f" in {student.num_classes} classes"
    return words, difference


def _refuse_wrong(path: Path, difference: float, most: float) -> None:
    if not difference <= most:
        raise CheckpointError(
            f"{path} was not written: its images would differ from the student's by "
            f"{difference:.2g}, more than {most:g}"
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return guarded(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
