"""`python -m advkd.info`: versions, the instruction set, which backend serves each op, and what
would serve each stage of a run on --device.

With --plan FOLDER, the plan of a teacher or a student for the CPU engine: its operations, their
sizes and FLOPs, with --time what each takes here, and the classes of a class-conditional network.
With a model file, the plans that it holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from advkd import device, ops
from advkd.cli import add_device, guarded
from advkd.data.sentences import brief
from advkd.data.source import MAX_NAMED
from advkd.deploy.model_file import describe_file
from advkd.engine.cpu import describe, lower
from advkd.engine.interface import input_shape
from advkd.files import read_json
from advkd.ops import _backend
from advkd.pretrained import load_student, load_teacher, resolve


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "unknown"


def report(place: torch.device | None = None) -> Iterator[str]:
    """The lines that the command prints; `place` is the device of a run (None: auto)."""
    for name in ("advkd", "torch", "triton", "numpy"):
        yield f"{name:<10} {_version(name)}"
    yield f"{'python':<10} {platform.python_version()} on {platform.machine()}"
    yield f"{'threads':<10} {torch.get_num_threads()}"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    yield f"{'CUDA':<10} {cuda}"
    extension = _backend.extension
    if extension is None:
        yield f"{'extension':<10} none: {_backend.extension_missing}"
    else:
        yield f"{'extension':<10} {extension.version}, compiled by {extension.compiler}"
        yield f"{'CPU':<10} {extension.isa()} in use; {', '.join(extension.isas())} run here"
        built = getattr(extension, "cuda_version", None)
        missing = ops.cuda_missing()
        yield f"{'CUDA C++':<10} {f'built for CUDA {built}' if built else 'left out'}" + (
            f"  ({missing})" if missing else ""
        )
    yield ""
    rows = ops.describe()
    width = max(len(op) for op, _, _ in rows)
    for op, backend, reason in rows:
        yield f"{op:<{width}}  {backend}" + (f"  ({reason})" if reason else "")
    yield ""
    yield from _stages(device.resolve("auto") if place is None else place)


def _stages(place: torch.device) -> Iterator[str]:
    """What serves the stages of a run on a device."""
    missing = _backend.asked_reference()
    if place.type == "cpu":
        missing = missing or _backend.extension_missing
        training, sampling = "torch and the fused ops", "the C++ engine"
    else:
        missing = missing or ops.cuda_missing()
        training, sampling = "torch, a CUDA graph for each kind of step", "CUDA graphs of plans"
    sampling = f"torch  ({missing})" if missing else sampling
    yield f"a run on {place}:"
    yield f"{'teacher, distill':<30}  {training}"
    yield f"{'trajectories, evaluate, report':<30}  {sampling}"


def plan_report(source: str, batch: int, timed: bool) -> Iterator[str]:
    """The plan of the teacher or student in a folder, made for `batch` images at a time."""
    if Path(source).is_file():
        yield from describe_file(Path(source))
        return
    config = resolve(source) / "config.json"
    is_student = config.is_file() and "student" in read_json(config)
    model = load_student(source) if is_student else load_teacher(source)
    size = input_shape(model)[1:]
    yield from describe(lower(model, size, batch=batch), batch, timed)
    if model.num_classes is not None:
        yield _classes(model.num_classes, model.class_names)


def _classes(count: int, names: Sequence[str] | None) -> str:
    """The classes that a network is conditional on, by number and name."""
    words = f"{count:,} {'class' if count == 1 else 'classes'}"
    if names is None:
        return f"{words} without names"
    named = [f"{label} {brief(name, 60)}" for label, name in enumerate(names[:MAX_NAMED])]
    more = [f"and {count - MAX_NAMED:,} more"] if count > MAX_NAMED else []
    return f"{words}: {', '.join([*named, *more])}"


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="advkd info", description=__doc__)
    parser.add_argument(
        "--plan", metavar="FOLDER", help="a teacher or student, zoo:NAME, or a model file"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="of the plan (default 1)")
    parser.add_argument("--time", action="store_true", help="measure the plan's operations")
    add_device(parser)
    args = parser.parse_args(argv)

    def lines() -> Iterator[str]:
        if args.plan:
            return plan_report(args.plan, args.batch, args.time)
        return report(device.resolve(args.device))

    return guarded(lambda: print("\n".join(lines())))


if __name__ == "__main__":
    sys.exit(main())
